"""An evaluation of one or several models of a run, or of a stack: `tempflow evaluate`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from tempflow.common.errors import BadInput
from tempflow.common.files import write_atomically
from tempflow.common.say import is_first
from tempflow.parallel import ranks as processes
from tempflow.prompts import Prompt, read_prompts
from tempflow.run.assembly import held_out_prompts
from tempflow.settings.checks import longest_wait
from tempflow.trained.output import make_folder
from tempflow.trained.sampling import Sampler, load_sampler, places_of
from tempflow.trained.scoring import load_jury, score
from tempflow.trained.source import Choice, Member, Source, check_choice, members, settle
from tempflow.trained.summary import Scored, table, to_json

WORDS = {"count": "prompts", "noises": "noises of each"}
SCORES, SUMMARY = "scores.csv", "summary.json"


@dataclass(frozen=True)
class Request:
    """What is asked of an evaluation; None where the settings of the run or stack tell."""

    choice: Choice = field(default_factory=Choice)
    rewards: tuple[str, ...] = ()
    options: dict[str, dict[str, Any]] = field(default_factory=dict)
    """name -> options of a scorer"""
    prompts: str | None = None
    """a file or folder"""
    noises: int | None = None
    seed: int | None = None
    rows: int | None = None


@dataclass(frozen=True)
class Report:
    """What came of it."""

    scored: Scored
    about: dict[str, Any]
    """the settings that decide it"""

    def write(self, folder: Path) -> None:
        """`scores.csv`, a row per model, prompt, noise and scorer, and `summary.json`, the table with its settings."""
        make_folder(folder)
        write_atomically(folder / SCORES, self.scored.to_csv().encode())
        write_atomically(folder / SUMMARY, to_json(self.scored, self.about).encode())

    def describe(self) -> str:
        """The table, and what it is of."""
        about, missing = self.about, self.scored.missing()
        names = ("count", "noises", "seed", "steps")
        head = f"{about['source']}: " + ", ".join(f"{WORDS.get(name, name)} {about[name]}" for name in names)
        more = f"\n{missing} scores are missing" if missing else ""
        return f"{head}\n{table(self.scored.lines())}{more}"


def evaluate(source: Source, request: Request) -> Report:
    """Scores of every model asked for, of the same prompts and noises; the same on all processes.

    Raises:
        BadInput: a checkpoint, prompts, scorers or a model that cannot be had.
        Halted: all pictures of a model are NaN.
    """
    config = source.config
    check_choice(source, request.choice)
    prompts = _prompts(source, request)
    ranks = processes.start(config.run.device, longest_wait(config.reward), config.parallel.offload)
    choice = settle(source, request.choice, ranks)
    jury = ranks.agree(lambda: load_jury(config, request.rewards, request.options, ranks.device))
    jury.rewards.check(prompts)
    jury.gold.check(prompts)
    noises, seed = request.noises or config.eval.noises, config.eval.seed if request.seed is None else request.seed
    places = places_of(len(prompts), noises, source.rows(request.rows))
    sampler, ranks = load_sampler(config, ranks, prompts, places, seed)
    found, tables = [], []
    each = members(source, choice)
    while (member := ranks.agree(lambda: _placed(next(each, None), sampler), "--checkpoint")) is not None:
        with tqdm(total=-(-len(places.slots) // ranks.size), desc=member.label, unit="picture",
                  disable=not is_first()) as bar:  # fmt: skip
            tables.append(score(sampler, jury, ranks, bar.update))
        found.append(member)
    compared = source.folder is not None and choice.before
    scored = Scored(found, tuple(jury.roles), prompts, tables, 0 if compared else None)
    about = {"source": str(source.folder or source.name), "prompts": request.prompts or config.prompts.test,
             "count": len(prompts), "noises": noises, "seed": seed, "steps": config.eval.steps,
             "scorers": jury.roles}  # fmt: skip
    return Report(scored, about)


def _placed(member: Member | None, sampler: Sampler) -> Member | None:
    """The model whose parameters the sampler has now; None where there is no further one."""
    if member is not None:
        sampler.loaded.place(member.run)
    return member


def _prompts(source: Source, request: Request) -> Sequence[Prompt]:
    if request.prompts is not None:
        return read_prompts(request.prompts, "--prompts")
    held_out = held_out_prompts(source.config)
    if not held_out:
        raise BadInput("--prompts", None, "the settings name no held-out prompts (prompts.test=null); give a file")
    return held_out
