"""How each tracker's own package is begun, told and ended. A further one is a function and a line of `TRACKERS`."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tempflow.common.errors import BadInput

PICTURES = "pictures"
"""the name under which trackers show the grid of pictures"""
LAST = 120.0
"""seconds for which the end of a run waits until everything is sent"""


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker is told of a run at its start."""

    folder: Path
    id: str
    """the same whenever the run goes on, and no other run's"""
    project: str
    settings: Mapping[str, Any]
    """section -> field -> value"""

    @property
    def name(self) -> str:
        return self.folder.resolve().name


@dataclass(frozen=True)
class Grid:
    """The pictures of an evaluation as one."""

    image: Image.Image
    caption: str
    """the prompts, in the order of the pictures"""


Log = Callable[[int, Mapping[str, float], Grid | None], None]
"""takes the numbers of a step, and the pictures if there are any"""


@dataclass(frozen=True)
class Opened:
    """A tracker that is at work."""

    log: Log
    close: Callable[[], object]


@dataclass(frozen=True)
class Tracker:
    """One word of run.trackers."""

    package: str
    """that has to be installed, and the extra that installs it"""
    begin: Callable[[TrackedRun], Opened]
    hint: str
    """what to do where it cannot be begun"""


def _tensorboard(run: TrackedRun) -> Opened:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(run.folder / "tensorboard"))

    def log(step: int, numbers: Mapping[str, float], grid: Grid | None) -> None:
        for name, value in numbers.items():
            writer.add_scalar(name, value, step)
        if grid is not None:
            writer.add_image(PICTURES, np.asarray(grid.image), step, dataformats="HWC")
            writer.add_text(f"{PICTURES}/prompts", _quoted(grid.caption), step)
        writer.flush()

    return Opened(log, writer.close)


def _quoted(text: str) -> str:
    """Text as TensorBoard's Markdown shows it: as it is."""
    return "\n".join(f"    {line}" for line in text.splitlines())


def _wandb(run: TrackedRun) -> Opened:
    import wandb

    quiet = wandb.Settings(console="off", silent=True, finish_timeout=LAST)
    own = wandb.init(project=run.project, name=run.name, id=run.id, resume="allow", dir=str(run.folder), settings=quiet)
    own.config.update(dict(run.settings), allow_val_change=True)

    def log(step: int, numbers: Mapping[str, float], grid: Grid | None) -> None:
        pictures = {PICTURES: wandb.Image(grid.image, caption=grid.caption)} if grid else {}
        own.log({**numbers, **pictures}, step=max(step, own.step))  # what belongs to a step before would be refused

    return Opened(log, own.finish)


def _trackio(run: TrackedRun) -> Opened:
    import trackio

    name = f"{run.name}-{run.id}"  # it knows a run again by its name alone
    own = trackio.init(run.project, name, config=dict(run.settings), resume="allow", embed=False)

    def log(step: int, numbers: Mapping[str, float], grid: Grid | None) -> None:
        pictures = {PICTURES: trackio.Image(np.asarray(grid.image), caption=grid.caption)} if grid else {}
        own.log({**numbers, **pictures}, step=step)

    return Opened(log, trackio.finish)


def _swanlab(run: TrackedRun) -> Opened:
    import swanlab

    quiet = swanlab.Settings(terminal={"proxy_type": "none"})
    own = swanlab.init(project=run.project, name=run.name, id=run.id, resume="allow", config=dict(run.settings),
                       log_dir=str(run.folder / "swanlab"), settings=quiet)  # fmt: skip

    def log(step: int, numbers: Mapping[str, float], grid: Grid | None) -> None:
        pictures = {PICTURES: swanlab.Image(np.asarray(grid.image), caption=grid.caption)} if grid else {}
        own.log({**numbers, **pictures}, step=step)

    return Opened(log, own.finish)


TRACKERS = {
    "tensorboard": Tracker("tensorboard", _tensorboard, "look whether the folder can be written to"),
    "wandb": Tracker("wandb", _wandb, "`wandb login` first, or WANDB_MODE=offline and `wandb sync` later"),
    "trackio": Tracker("trackio", _trackio, "look whether its folder (TRACKIO_DIR) can be written to"),
    "swanlab": Tracker("swanlab", _swanlab, "`swanlab login` first, or SWANLAB_MODE=offline and `swanlab sync` later"),
}


def check_trackers(names: Sequence[str]) -> None:
    """Refuses a tracker whose package is absent.

    Raises:
        BadInput: with the command that installs it.
    """
    for name in names:
        package = TRACKERS[name].package
        if not _is_installed(package):
            raise BadInput("run.trackers", name, f"is not installed: pip install 'tempflow[{package}]'")


def _is_installed(package: str) -> bool:
    """Whether there is such a package, and not only a folder of that name, such as the one that wandb leaves."""
    found = importlib.util.find_spec(package)
    return found is not None and found.origin is not None
