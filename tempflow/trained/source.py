"""What a command line names: the folder of a run with its checkpoints, or a stack of presets and files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from tempflow.common.errors import BadInput
from tempflow.common.files import user_path
from tempflow.parallel.ranks import Ranks
from tempflow.run.checkpoint import iteration_of
from tempflow.run.folder import first_rows
from tempflow.settings.fields import Config
from tempflow.settings.reading import load, presets
from tempflow.trained.opening import (
    FINAL,
    LAST,
    WEIGHTS,
    TrainedRun,
    check_final,
    find_checkpoint,
    open_run,
    read_settings,
)

ROWS = 8
"""Pictures of a network call where neither settings nor a run tell."""
MOST = 16
"""Pictures of a network call that nobody asked for by number: several processes need several calls to share."""
BEFORE = "before"


@dataclass(frozen=True)
class Source:
    """A run, or a stack: a model before training."""

    name: str
    """for folders: a run's name, or those of a stack"""
    config: Config
    folder: Path | None = None
    """of the run"""

    def rows(self, asked: int | None) -> int:
        """Pictures of a network call: as many as asked for, or as in the run's own evaluations, up to `MOST`."""
        rows = self.config.tails.rows
        if rows == "auto":
            rows = (first_rows(self.folder) if self.folder else None) or ROWS
        return asked or min(rows, MOST)


@dataclass(frozen=True)
class Member:
    """One of the models that are compared."""

    label: str
    run: TrainedRun | None = None
    """None: the model before training"""

    def describe(self) -> dict[str, Any]:
        """What its pictures and scores were made from."""
        if self.run is None:
            return {"model": self.label}
        run = self.run
        return {"model": self.label, "checkpoint": run.checkpoint, "iteration": run.iteration, "weights": run.weights}


@dataclass(frozen=True)
class Choice:
    """Which models of a source are compared."""

    checkpoints: tuple[str, ...] = ()
    """`last`, `best`, `final` or numbers of iterations; of a run the last where none is given"""
    weights: str | None = None
    """averaged or raw; averaged where nothing is given"""
    before: bool = True
    """the model before training, too"""


def read_source(names: Sequence[str], overrides: Sequence[str]) -> Source:
    """A run, if the one name is that of a folder, else a stack; presets come before folders of their name.

    Raises:
        BadInput: no such run or preset, or settings that are wrong.
    """
    folders = [name for name in names if name not in presets() and _is_folder(name)]
    if not folders:
        stem = "_".join(Path(name).stem for name in names)
        return Source(stem or "digits", load([*names, *overrides]))
    if len(names) > 1:
        raise BadInput("run", folders[0], "the folder of a run stands alone; settings may follow it")
    folder = user_path("run", names[0])
    config = read_settings(folder, overrides)
    return Source(folder.resolve().name, config, folder)


def _is_folder(name: str) -> bool:
    path = user_path("run", name)
    return path.is_dir() or (not path.exists() and "/" in name and path.suffix not in (".yaml", ".yml"))


def check_choice(source: Source, choice: Choice) -> None:
    """Refuses what there is not, before anything heavy is done.

    Raises:
        BadInput: a checkpoint that is not there, or a stack, which has none.
    """
    if source.folder is None:
        for option, value in (("--checkpoint", ",".join(choice.checkpoints)), ("--weights", choice.weights)):
            if value:
                raise BadInput(option, value, "only a run has checkpoints; give its folder in place of a stack")
        return
    if choice.weights and choice.weights not in WEIGHTS:
        raise BadInput("--weights", choice.weights, f"choose one of {', '.join(WEIGHTS)}")
    for checkpoint in choice.checkpoints or (LAST,):
        if checkpoint == FINAL:
            check_final(source.folder, source.config, choice.weights or "averaged")
        else:
            find_checkpoint(source.folder, checkpoint)


def settle(source: Source, choice: Choice, ranks: Ranks) -> Choice:
    """The checkpoints that the first of several processes finds: a run may be going on, and each would find its own."""
    if ranks.size == 1 or source.folder is None:
        return choice
    asked, folder = choice.checkpoints or (LAST,), source.folder

    def find() -> list[int]:
        found = [ranks.first and name != FINAL and iteration_of(find_checkpoint(folder, name)) for name in asked]
        return [int(number) for number in found]

    chosen = ranks.gather(torch.tensor([ranks.agree(find)]), 0)[0].tolist()
    return replace(choice, checkpoints=tuple(str(number) if number else FINAL for number in chosen))


def members(source: Source, choice: Choice) -> Iterator[Member]:
    """The models: the one before training first, then each checkpoint once.

    Adapters are read at once, since a run that is going on may drop a checkpoint meanwhile; whole transformers when
    they are due.

    Raises:
        BadInput: as `open_run`.
    """
    if source.folder is None:
        yield Member(source.name)
        return
    asked, weights, seen = choice.checkpoints or (LAST,), choice.weights or "averaged", set()
    runs = (open_run(source.folder, checkpoint, weights) for checkpoint in asked)
    if source.config.model.train == "lora":
        runs = iter(list(runs))
    if choice.before:
        yield Member(BEFORE)
    for run in runs:
        label = (f"iteration {run.iteration}" if run.iteration else FINAL) + (" (raw)" if run.weights == "raw" else "")
        if label not in seen:
            yield Member(label, replace(run, config=source.config))
        seen.add(label)


def read_checkpoints(text: str | None) -> tuple[str, ...]:
    """`10,20,best` -> its parts.

    Raises:
        BadInput: an empty part.
    """
    parts = tuple(part.strip() for part in text.split(",")) if text is not None else ()
    if "" in parts:
        raise BadInput("--checkpoint", text, f"give {LAST}, best, {FINAL}, an iteration, or several joined by commas")
    return parts
