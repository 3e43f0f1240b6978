"""The table of faults: what is done to a run, and what must hold."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain

import torch
from faults import deeds, troubles
from faults.deeds import HUP, INT, KILL, TERM, USR1, send
from faults.kinds import EQUAL, FINISHED, REFUSED, Ends, Fault, Room
from faults.servers import ANSWERS

WRONG, HALTED, STOPPED, KILLED = 2, 75, 130, 137
"""Exit codes: the user has to change something; the run stopped on its way; a signal asked it to; SIGKILL."""
LEFT = 130
"""of a rank whose torchrun is gone"""
ANY = ()
STORE_ANEW = (("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1"),)
"""Else torchrun keeps one store over restarts, in which a new rank may find where an old one listened."""
TWO, RESTARTS, COMMAND, TORCHRUN = "2 ranks", "2 ranks, restarts", "command", "torchrun command"
SHARES = "2 ranks, shares"
EACH = ("run.save_every=1",)
"""a checkpoint after each iteration"""
SCORE_REFUSED = "iteration 2 is saved"


def killed(name: str, at: str, **more: object) -> Fault:
    """SIGKILL: nothing can be said or saved; what an earlier iteration saved must be whole."""
    return Fault(f"SIGKILL {name}", Ends((KILLED,), lost=1), at=at, do=send(KILL), settings=EACH, **more)


def killed_ranks(name: str, target: str, at: str = "loop", way: str = TWO, **more: object) -> Fault:
    ends = Ends(ANY, within=30, lost=1)
    do = deeds.kill_all if target == "all" else send(KILL, target)
    return Fault(f"SIGKILL {name}", ends, way, at=at, do=do, settings=EACH, **more)


KILLS = Room("Kills", (
    killed("at a random moment of its life", "any", tries=6),
    killed("at a random moment of its loop", "loop", tries=24),
    killed("while it is set up", "set-up"),
    killed("while it evaluates", "evaluation"),
    killed("while it saves", "saving", tries=3),
    Fault("SIGKILL of the command, at a random moment, imports included", Ends((KILLED,), lost=1), COMMAND, EACH, "any",
          send(KILL)),
    killed_ranks("of torchrun and 2 ranks at once, at a random moment of their life", "all", "any", tries=4),
    killed_ranks("of torchrun and 2 ranks at once, at a random moment of their loop", "all", tries=12),
    killed_ranks("of torchrun alone, at a random moment of the loop", "run", tries=4),
    Fault("SIGKILL of torchrun alone in an iteration: its ranks do not go on", Ends((LEFT,)), TWO,
          at="iteration 2", do=send(KILL)),
    killed_ranks("of the first of 2 ranks, at a random moment of the loop", "rank0", tries=3),
    killed_ranks("of the second of 2 ranks, at a random moment of the loop", "rank1", tries=3),
    Fault("SIGKILL of a rank, torchrun --max-restarts=3 run.resume=auto", Ends((0,), lost=1), RESTARTS, EACH,
          "iteration 4", send(KILL, "rank1"), environment=STORE_ANEW),
    Fault("SIGKILL of the torchrun command, at a random moment, imports included", Ends(ANY, lost=1),
          TORCHRUN, EACH, "any", send(KILL)),
))  # fmt: skip


def signalled(name: str, at: str, number: int, **more: object) -> Fault:
    """A signal that asks for an end: the iteration is finished, saved, and a line says how to go on."""
    return Fault(f"{name}", Ends((STOPPED,), "resume"), at=at, do=send(number), **more)


SIGNALS = Room("Signals", (
    signalled("SIGTERM in an iteration", "iteration 3", TERM),
    signalled("SIGINT in an iteration", "iteration 3", INT),
    signalled("SIGHUP in an iteration", "iteration 3", HUP),
    signalled("SIGUSR1 (a scheduler's warning) in an iteration", "iteration 3", USR1),
    signalled("SIGTERM while it is set up", "set-up", TERM),
    signalled("SIGINT while it is set up", "set-up", INT),
    signalled("SIGTERM while it evaluates", "evaluation", TERM),
    replace(signalled("SIGTERM while it saves", "saving", TERM), settings=EACH),
    Fault("SIGTERM, then another", Ends((STOPPED, 128 + TERM), within=5, lost=2), do=deeds.send_twice(TERM, TERM),
          troubles=(troubles.scorer(troubles.hangs),), settings=EACH),
    Fault("Ctrl-C, then another", Ends((STOPPED,), within=5, lost=2), do=deeds.send_twice(INT, INT),
          troubles=(troubles.scorer(troubles.hangs),), settings=EACH),
    Fault("SIGTERM while the scorer hangs: given up after run.grace", Ends((STOPPED,), "grace|resume", within=12),
          do=send(TERM), troubles=(troubles.scorer(troubles.hangs),), settings=(*EACH, "run.grace=2")),
    Fault("SIGINT during imports", Ends((STOPPED,)), COMMAND, at="2 s", do=send(INT)),
    Fault("SIGTERM during imports", Ends((STOPPED, 128 + TERM)), COMMAND, at="2 s", do=send(TERM)),
    Fault("SIGTERM to torchrun", Ends((STOPPED,), "resume", within=25), TWO, do=send(TERM)),
    Fault("SIGINT (Ctrl-C) to torchrun", Ends((STOPPED,), "resume", within=25), TWO, do=send(INT)),
    Fault("SIGHUP to torchrun", Ends((STOPPED,), "resume", within=25), TWO, do=send(HUP)),
    Fault("SIGUSR1 to the second of 2 ranks", Ends((STOPPED,), "resume", within=25), TWO, do=send(USR1, "rank1")),
    Fault("SIGTERM to torchrun while it is set up", Ends((STOPPED, 128 + TERM), within=25), TWO, at="set-up",
          do=send(TERM)),
))  # fmt: skip


def scored(name: str, make: object, words: str, **more: object) -> Fault:
    """A scorer's failure in the third iteration: two are saved, a line names it."""
    return Fault(f"the scorer {name}", Ends((HALTED,), words), troubles=(troubles.scorer(make),), **more)


def raising(error: BaseException) -> Fault:
    kind = type(error).__name__
    return scored(f"raises {kind}", troubles.raises(error), f"reward.*{SCORE_REFUSED}")


ERRORS = (RuntimeError("shapes do not fit"), KeyError("grid"), ValueError("no grid"), MemoryError(), AssertionError(),
          OSError(28, "No space left on device"), ZeroDivisionError("division by zero"), SystemExit(3),
          torch.OutOfMemoryError("tried to allocate 20 GiB"))  # fmt: skip
SCORERS = Room("Scorers", (
    *map(raising, ERRORS),
    scored("gives NaN for all images", lambda scores: scores * torch.nan, "reward"),
    scored("gives an infinite score", lambda scores: scores / 0, "infinite"),
    scored("gives a score too few", lambda scores: scores[1:], "one number per image"),
    scored("gives a matrix", lambda scores: scores[None], "one number per image"),
    scored("gives words", lambda scores: ["good"] * len(scores), "no numbers"),
    scored("gives nothing", lambda scores: None, "reward"),
    Fault("the second opinion raises RuntimeError", Ends((HALTED,), "reward.*saved"),
          troubles=(troubles.gold_raises(),)),
    Fault("the scorer of the second of 2 ranks raises RuntimeError", Ends((HALTED,), SCORE_REFUSED), TWO,
          troubles=(troubles.scorer(troubles.raises(ERRORS[0]), rank=1),)),
    Fault("the scorer of the second of 2 ranks raises SystemExit", Ends((HALTED,), SCORE_REFUSED), TWO,
          troubles=(troubles.scorer(troubles.raises(SystemExit(3)), rank=1),)),
))  # fmt: skip


def spoilt(fault: str) -> Fault:
    """A server that answers wrongly three times: the run goes on as if nothing had been."""
    return Fault(f"the server, three times: {fault}", Ends((0,)), served=True,
                 do=lambda scene: scene.server.spoil(fault, 3))  # fmt: skip


SERVERS = Room("Scorer servers", (
    Fault("the server is killed", Ends((HALTED,), SCORE_REFUSED), served=True, do=deeds.stop_server,
          settings=("run.save_every=100", "reward.patience=3")),
    Fault("the server is killed and is back after 2 s", Ends((0,)), served=True, do=deeds.restart_server),
    *map(spoilt, ANSWERS),
))  # fmt: skip

DISK = Room("Disk and folder", (
    Fault("the disk is full", Ends((HALTED,), "space|disk", lost=1), do=deeds.fill, mend=deeds.clear, settings=EACH,
          disk=64),
    Fault("a limit on the size of files", Ends((HALTED,), "large|limit|size", lost=1), settings=EACH,
          troubles=(troubles.in_iteration(troubles.small_files(20_000)),)),
    Fault("the run's folder becomes read-only", Ends((HALTED,), "run.dir|ermission", lost=1), settings=EACH,
          do=deeds.lock_up, mend=deeds.open_up, troubles=(troubles.at_once(troubles.unprivileged),)),
    Fault("the run's folder is removed", Ends((HALTED,), "run.dir|No such", lost=9), do=deeds.remove(), settings=EACH),
    Fault("the folder of checkpoints is removed", Ends((HALTED, 0), lost=9), do=deeds.remove("checkpoints"),
          settings=EACH),
    Fault("a file in the place of the folder of checkpoints", Ends((HALTED,), "checkpoints", lost=1), settings=EACH,
          do=deeds.replace_by_file("checkpoints"), mend=deeds.put_back("checkpoints")),
    Fault("a second process on the folder of a run under way", Ends((WRONG,), "run.dir"), do=deeds.another),
    Fault("two processes at once on a new folder", Ends((WRONG,), "run.dir"), at="start", do=deeds.another),
))  # fmt: skip


def damaged(name: str, prepared: object, words: str = "step_000004") -> Fault:
    """The newest checkpoint is no good: it is named, and the run goes on from the one before."""
    return Fault(f"newest checkpoint: {name}", Ends((0,), words, lost=1), at="start", prepared=prepared)


WEIGHTS, OPTIMIZER, AVERAGE, STATE = (
    "parameters.safetensors",
    "optimizer.safetensors",
    "average.safetensors",
    "state.json",
)
CHECKPOINTS = Room("Checkpoints", (
    *(damaged(f"{name} cut in half", deeds.truncate(name)) for name in (WEIGHTS, OPTIMIZER, AVERAGE, STATE)),
    *(damaged(f"one bit of {name} flipped", deeds.flip(name)) for name in (WEIGHTS, OPTIMIZER, AVERAGE)),
    *(damaged(f"NaN in {name}", deeds.fill_with_nan(name)) for name in (WEIGHTS, OPTIMIZER, AVERAGE)),
    *(damaged(f"{name} missing", deeds.drop(name)) for name in (WEIGHTS, OPTIMIZER, STATE)),
    damaged("state.json empty", deeds.overwrite(STATE, b"")),
    damaged("state.json of other JSON", deeds.overwrite(STATE, b"[1, 2]")),
    *(damaged(f"iteration {number}", deeds.set_iteration(number)) for number in (-1, 1, 10**9)),
    damaged("parts of a newer one, as a kill leaves them", deeds.leave_partial, ""),
    Fault("all checkpoints damaged", Ends((WRONG,), "step_00000"), at="start", then=REFUSED,
          prepared=deeds.every(deeds.truncate(WEIGHTS))),
))  # fmt: skip

NUMBERS = Room("Numbers and memory", (
    Fault("a gradient is NaN once: its step is not taken", Ends((0,)), then=FINISHED,
          troubles=(troubles.not_a_number(range(3, 4)),)),
    Fault("gradients are NaN for ever", Ends((HALTED,), "finite", lost=9), settings=EACH, then=FINISHED,
          troubles=(troubles.not_a_number(range(3, 99)),)),
    Fault("the network gives NaN", Ends((HALTED,), "finite|NaN", lost=9), settings=EACH, then=FINISHED,
          troubles=(troubles.velocity_not_a_number(),)),
    Fault("memory is short once in tails", Ends((0,), "memory ran out"), then=FINISHED,
          troubles=(troubles.memory(12),)),
    Fault("memory is short in tails of any size", Ends((HALTED,), "memory.*saved"), troubles=(troubles.memory(0),)),
))  # fmt: skip

RANKS = Room("Ranks", (
    Fault("the second of 2 ranks fails while it is set up", Ends((HALTED, STOPPED), "process 1.*Input/output error",
          within=25), TWO, at="set-up",
          troubles=(troubles.fail_in_set_up(),)),
    Fault("a rank hangs: the collective times out", Ends((HALTED, None), "process 0", within=40, lost=2), TWO,
          (*EACH, "reward.timeout=1", "reward.patience=1"), then=EQUAL,
          troubles=(troubles.in_iteration(lambda: troubles.hangs(None), rank=1),
                    troubles.at_once(troubles.little_patience(3.0)))),
))  # fmt: skip

SHARED = Room("A network in shares", (
    killed_ranks("of torchrun and 2 ranks with shares, at a random moment of their loop", "all", way=SHARES, tries=3),
    killed_ranks("of the second of 2 ranks with shares, at a random moment of the loop", "rank1", way=SHARES),
    Fault("SIGTERM to torchrun, ranks with shares", Ends((STOPPED,), "resume", within=60), SHARES, do=send(TERM)),
    Fault("SIGTERM to torchrun, ranks with shares, each iteration saved", Ends((STOPPED,), "resume", within=60), SHARES,
          EACH, do=send(TERM)),
    Fault("the scorer of the second of 2 ranks with shares raises RuntimeError",
          Ends((HALTED,), SCORE_REFUSED, within=60), SHARES,
          troubles=(troubles.scorer(troubles.raises(ERRORS[0]), rank=1),)),
))  # fmt: skip

ROOMS = (KILLS, SIGNALS, SCORERS, SERVERS, DISK, CHECKPOINTS, NUMBERS, RANKS, SHARED)


def chosen(pattern: str) -> list[tuple[str, Fault]]:
    """Kinds whose room or name contains one of the words of `a|b`, with their rooms; empty: all."""
    words = [word.lower() for word in pattern.split("|") if word]
    every = chain.from_iterable(((room.name, fault) for fault in room.faults) for room in ROOMS)
    return [(room, fault) for room, fault in every
            if not words or any(word in f"{room}: {fault.name}".lower() for word in words)]  # fmt: skip
