"""One trial: a run, a fault, its end, the run that goes on afterwards, and what did not hold."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

from faults.bench import ITERATIONS, PLAIN, RANDOM, SLOWEST, Bench, wait_for
from faults.kinds import EQUAL, REFUSED, WAYS, Fault, Scene
from faults.processes import POLL, Started
from faults.results import differences, traceback_in, words
from faults.servers import Server

KILLED = 128 + signal.SIGKILL
DRAWS = 9
"""of a random moment, until one lies within the run"""


@dataclass
class Outcome:
    """What was seen in one trial."""

    room: str
    fault: str
    way: str
    trial: int
    moment: str = ""
    code: int | None = None
    line: str = ""
    seconds: float = 0.0
    """from the fault to the end of the last process"""
    bound: float = 0.0
    """what they must not exceed"""
    begun: int = 0
    """iterations begun before the end"""
    saved: int | None = None
    """iterations done where the run went on; None where it did not"""
    lost: int | None = None
    """iterations lost beyond the one in flight"""
    allowed: int = 0
    """how many may be lost so"""
    after: str = ""
    """what the run came to afterwards"""
    problems: list[str] = field(default_factory=list)
    """what did not hold; empty: all did"""


class TooLate(Exception):
    """The run was over when the moment drawn came."""


def attempt(bench: Bench, room: str, fault: Fault, trial: int) -> Outcome:
    """Tries a fault once; with another moment, where the run was over before."""
    for again in range(DRAWS):
        outcome = Outcome(room, fault.name, fault.way, trial, bench.moment(fault, f"{trial}.{again}"))
        try:
            return _attempt(bench, fault, outcome)
        except TooLate:
            continue
    outcome.problems.append("the run was over before every moment that was drawn")
    return outcome


def _attempt(bench: Bench, fault: Fault, outcome: Outcome) -> Outcome:
    trial = outcome.trial
    name = re.sub(r"\W+", "-", f"{fault.name} {trial}")
    home = bench.folder / "trials" / name
    shutil.rmtree(home, ignore_errors=True)
    run = (_disk(home, fault.disk) if fault.disk else home) / "run"
    server = None
    try:
        home.mkdir(parents=True, exist_ok=True)
        home.chmod(0o777)
        server = Server(home) if fault.served else None
        scene = _disturb(bench, fault, f"trials/{name}", run, server, outcome)
        fault.mend(scene)
        if server and not server.pid:
            server.start()
        _go_on(bench, fault, f"trials/{name}", run, scene, outcome)
    except (OSError, RuntimeError) as error:  # a trial that cannot be made is told, and the others go on
        outcome.problems.append(f"the trial itself failed: {error}")
    finally:
        if server:
            server.stop()
        if fault.disk:
            subprocess.run(["umount", "-l", run.parent], check=False)
    if not outcome.problems:
        shutil.rmtree(home, ignore_errors=True)
    return outcome


def _disk(home: Path, size: int) -> Path:
    """A disk of so many MiB of its own.

    Raises:
        OSError: this user may not mount one.
    """
    place = home / "disk"
    place.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}m", "tmpfs", place], capture_output=True)
    if done.returncode:
        raise OSError(f"no small disk can be mounted here: {done.stderr.decode().strip()}")
    return place


def _disturb(bench: Bench, fault: Fault, name: str, run: Path, server: Server | None, outcome: Outcome) -> Scene:
    """The run until its end, with what was seen of it."""
    served = (f"reward.servers=[{server.url}]", "reward.timeout=1") if server else ()
    settings = (*served, *fault.settings, "run.resume=auto")
    if fault.prepared:
        shutil.copytree(bench.halted(fault.way), run)
        fault.prepared(run)
    parts = {"troubles": fault.troubles, "pause_at": fault.at if fault.do else None,
             "environment": dict(fault.environment)}  # fmt: skip
    started = WAYS[fault.way](bench.job(f"{name}/first", run, *settings, **parts))
    scene = Scene(run, started, lambda: WAYS[fault.way](bench.job(f"{name}/second", run, *settings)), server=server)
    struck = _strike(fault, scene, outcome)
    _await_end(fault, scene, struck, outcome)
    return scene


def _strike(fault: Fault, scene: Scene, outcome: Outcome) -> float:
    """Waits for the moment and does what the fault does; returns when that was."""
    started, moment = scene.started, outcome.moment
    name, _, after = moment.rpartition(" + ") if moment.endswith(" s") else (moment, "", "0 s")
    wait_for(name, started)
    limit = (time.monotonic() if name else started.began) + float(after.removesuffix(" s"))
    while time.monotonic() < limit and started.poll() is None:
        time.sleep(POLL)
    struck = time.monotonic()
    if fault.at in RANDOM and (started.poll() is not None or (started.folder / "rank0.code").exists()):
        started.kill()
        raise TooLate
    if fault.do and started.poll() is None:
        started.look()
        fault.do(scene)
    return struck


def _await_end(fault: Fault, scene: Scene, struck: float, outcome: Outcome) -> None:
    """Waits until no process is left, and holds their ends against what must hold."""
    processes = [scene.started, *scene.others]
    going_on = 0 in fault.ends.codes or scene.others
    outcome.bound, outcome.allowed = fault.ends.within + (SLOWEST if going_on else 0), fault.ends.lost
    limit = struck + outcome.bound
    ended = {id(each): each.wait(limit) for each in processes}
    while any(each.living() for each in processes) and time.monotonic() < limit:
        time.sleep(POLL)
    outcome.seconds = round(time.monotonic() - struck, 1)
    left = [pid for each in processes for pid in each.living()]
    hung = left or None in ended.values()
    for each in processes:
        each.kill()
    if hung:
        outcome.problems.append(f"not ended after {outcome.seconds} s")
    judged = next((each for each in processes if scene.others and each.code), processes[-1])
    rest = [each for each in processes if each is not judged]
    outcome.problems += [f"the other process ended with {each.code}" for each in rest if each.code]
    _judge(fault, scene, judged, outcome)


def _judge(fault: Fault, scene: Scene, judged: Started, outcome: Outcome) -> None:
    said, code = words(judged.folder), rank_code(judged)
    outcome.code = code
    fitting = [line for line in said if re.search(fault.ends.words, line, re.IGNORECASE)]
    told = fitting if fault.ends.words or code not in (0, KILLED, None) else []  # else nothing is expected to be said
    outcome.line = (told or [""])[-1].removeprefix("tempflow: ").replace(f"{scene.run.parent}/", "")
    outcome.begun = _last_iteration(judged)
    if fault.ends.codes and code not in fault.ends.codes:
        outcome.problems.append(f"exit code {code}, expected {' or '.join(map(str, fault.ends.codes))}")
    if fault.ends.words and not fitting:
        outcome.problems.append(f"no line that says {fault.ends.words!r}")
    if traceback_in(judged.folder):
        outcome.problems.append("traceback")


def rank_code(started: Started) -> int | None:
    """The exit code of the first rank, which torchrun does not pass on; the process's where there is no torchrun."""
    path = started.folder / "rank0.code"
    if not (started.folder / "torchrun.txt").exists():
        return started.code
    return int(path.read_text()) if path.exists() else None


def _last_iteration(started: Started) -> int:
    numbers = [int(moment.split()[1]) for moment in started.moments() if moment.startswith("iteration")]
    return max(numbers, default=0)


def _go_on(bench: Bench, fault: Fault, name: str, run: Path, scene: Scene, outcome: Outcome) -> None:
    """The run goes on afterwards, as a user would, and is compared with an undisturbed one."""
    if fault.then == REFUSED:
        outcome.after = "refused"
        return
    server = (f"reward.servers=[{scene.server.url}]",) if scene.server else ()
    way = PLAIN.get(fault.way, fault.way)
    job = bench.job(f"{name}/after", run, *server, "run.save_every=100", "run.resume=auto")
    later = WAYS[way](job)
    code = later.wait(later.began + SLOWEST)
    later.kill()
    begun = [moment for moment in later.moments() if moment.startswith("iteration")]
    outcome.saved = int(begun[0].split()[1]) - 1 if begun else ITERATIONS
    outcome.lost = max(0, outcome.begun - 1 - outcome.saved)
    if outcome.lost > fault.ends.lost:
        outcome.problems.append(f"{outcome.lost} iterations lost beyond the one in flight")
    if code != 0 or rank_code(later) != 0:
        outcome.after = f"does not go on: {(words(later.folder) or [''])[-1]}"
        outcome.problems.append(outcome.after)
        return
    _compare(bench, fault, run, outcome)


def _compare(bench: Bench, fault: Fault, run: Path, outcome: Outcome) -> None:
    found = differences(run, bench.undisturbed(fault.way)) if fault.then == EQUAL else []
    outcome.after = fault.then if not found else f"differs: {', '.join(found)}"
    if found:
        outcome.problems.append(outcome.after)
