"""Saving a run: checkpoint, trained weights, report. On the first process, beside the next iteration."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from tempflow.common.errors import Halted, OneLine
from tempflow.common.files import on_disk
from tempflow.records.figures import draw_report
from tempflow.records.page import write_page
from tempflow.run import checkpoint
from tempflow.run.folder import METRICS, note_saved, write_settings
from tempflow.run.saver import Saver
from tempflow.run.snapshot import Progress, Snapshot, Unfit, take
from tempflow.run.trainer import Trainer

SELDOM = 200
"""A report is drawn again after so many times as long as drawing it took."""

Export = Callable[[Path], None]
"""writes the trained weights in the format of the model's own library"""


class Drawing:
    """Something that is drawn again and again, and may not take much of the time."""

    def __init__(self, draw: Callable[[Path], object], folder: Path):
        self.draw, self.folder = draw, folder
        self.began, self.took = -float("inf"), 0.0

    def again(self, always: bool = False) -> None:
        """Draws it, if `always` or that takes little of the time since it was drawn last."""
        now = time.monotonic()
        if always or now - self.began >= SELDOM * self.took:
            self.draw(self.folder)
            self.began, self.took = now, time.monotonic() - now


class Keeper:
    """What of a run is saved, and what may be saved when it fails."""

    def __init__(self, trainer: Trainer, folder: Path):
        self.trainer, self.folder = trainer, folder
        self.saver = Saver()
        self.saved = 0
        """iterations that the newest checkpoint on disk holds"""
        self._steps_begun = 0
        self._reports = (Drawing(draw_report, folder), Drawing(write_page, folder))
        trainer.stepper.optimizer.register_step_pre_hook(self._step_begins)

    def _step_begins(self, *_: object) -> None:
        self._steps_begun += 1

    def mark(self, progress: Progress, saved: bool = False) -> None:
        """Parameters are those of `progress` from here until the next optimizer step begins."""
        self._steps_begun = 0
        self.saved = progress.iteration if saved else self.saved

    @property
    def settled(self) -> bool:
        """Whether parameters, average and optimizer are those of the last finished iteration."""
        return self._steps_begun == 0 and not self.trainer.stepper.average.exchanging

    def clean_up(self) -> None:
        """Removes what a kill left of weights that were being written."""
        for left in self.folder.glob(".saving-*"):
            shutil.rmtree(left, ignore_errors=True)

    def save(self, progress: Progress) -> None:
        """Begins to write a checkpoint, weights and report; all processes call it.

        Raises:
            BadInput: on all processes, where what was saved before could not be written.
        """
        self.wait()
        work = self._prepared(progress)
        if work is not None:
            self.saver.start(work)

    def wait(self) -> None:
        """Until what was saved is on the disk.

        Raises:
            BadInput: on all processes, where that failed.
        """
        self.trainer.ranks.agree(self.saver.wait, "run.dir")

    def finish(self, progress: Progress | None = None) -> None:
        """The last words on disk: the weights again, of a run that was over already, and the report."""
        self.wait()
        export = None if progress is None else self._exported()
        if self.trainer.ranks.first:
            self.saver.start(partial(self._publish, export, last=True))
        self.wait()

    def show(self) -> None:
        """After an evaluation: begins to write the page, if that takes little time and nothing is being written."""
        if self.trainer.ranks.first:
            self.saver.start_if_idle(self._reports[-1].again)

    def rescue(self, progress: Progress, together: bool, problem: str, error: BaseException) -> str:
        """After a failure: saves what was learnt, where that can be; says what came of it, and how to go on.

        Args:
            together: all processes are here.
            problem: why it may not be saved, if it may not.
        """
        failed = self._attempt(self.saver.wait)
        refused = isinstance(error, Halted) and self._steps_begun <= 1  # of one step, which was not taken
        settled = self.settled or (refused and not self.trainer.stepper.average.exchanging)
        work = None
        if progress.iteration > self.saved and settled and not problem and (together or not self.trainer.ranks.in_step):
            work, problem = self._try_to_prepare(progress)
        if work is not None:
            problem = self._attempt(work)
        return self._told(progress, problem or failed)

    def _try_to_prepare(self, progress: Progress) -> tuple[Callable[[], None] | None, str]:
        try:
            return self._prepared(progress), ""
        except (RuntimeError, OSError, MemoryError) as error:  # a device that answers no more
            return None, str(error).partition("\n")[0]

    def _attempt(self, work: Callable[[], None]) -> str:
        try:
            work()
        except (OSError, Unfit, OneLine) as error:
            return getattr(error, "strerror", None) or str(error)
        return ""

    def _told(self, progress: Progress, problem: str) -> str:
        if not self.trainer.ranks.first:
            return "go on with run.resume=true"
        if not progress.iteration:
            return "nothing was learnt yet; begin again with run.resume=true"
        if self.saved == progress.iteration:
            return f"iteration {self.saved} is saved, go on with run.resume=true"
        why = f" could not be saved ({problem})" if problem else " was left in the midst of its updates"
        lost = progress.iteration if problem else progress.iteration + 1
        from_where = f"from iteration {self.saved}" if self.saved else "from the beginning"
        return f"iteration {lost}{why}; go on {from_where} with run.resume=true"

    def _prepared(self, progress: Progress) -> Callable[[], None] | None:
        """What there is to write, which no longer changes; None in processes that write nothing."""
        first, stepper = self.trainer.ranks.first, self.trainer.stepper
        if not (first or self.trainer.ranks.in_step):  # what is shared out is gathered by all
            return None
        metrics = self.folder / METRICS
        progress = replace(progress, metrics_bytes=metrics.stat().st_size if first and metrics.exists() else None)
        snapshot = take(progress, stepper, asdict(self.trainer.config), keep=first)
        export = self._exported()
        return partial(self._write, snapshot, export) if first else None

    def _exported(self) -> Export:
        with self.trainer.stepper.average.applied():
            return self.trainer.policy.export(self.trainer.ranks.first)

    def _write(self, snapshot: Snapshot, export: Export) -> None:
        self._make_folder()
        if (self.folder / METRICS).exists():
            on_disk(self.folder / METRICS)
        checkpoint.save(self.folder / "checkpoints", snapshot, self.trainer.config.run.keep_checkpoints)
        note_saved(self.folder, snapshot.progress.iteration)
        self.saved = snapshot.progress.iteration
        self._publish(export)

    def _make_folder(self) -> None:
        """A folder that was removed under a run is made anew, unless what it lay in is gone, too."""
        if not self.folder.exists():
            self.folder.mkdir()
            write_settings(self.trainer.config, replace(self.trainer.ranks, size=1))

    def _publish(self, export: Export | None, last: bool = False) -> None:
        """What people look at: the trained weights (averaged), and the reports."""
        if export is not None:
            export(self.folder)
        for report in self._reports:
            report.again(always=last)
