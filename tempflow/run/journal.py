"""What a run writes and says: metrics, evaluations, checkpoints, pictures, words."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path

import torch
from tqdm import tqdm

from tempflow.common.errors import BadInput, Halted, OneLine
from tempflow.common.failures import as_line
from tempflow.common.say import say
from tempflow.common.stopping import STOPPING, Stopped
from tempflow.forecast.cost import network_rows
from tempflow.learn.objective import WEIGHT
from tempflow.learn.optimizers import state_bytes
from tempflow.records.figures import save_pictures
from tempflow.records.gallery import Room, keep_small
from tempflow.records.rows import EvaluationRow, IterationRow, MetricsWriter, Row, StartRow, plain_row, read_metrics
from tempflow.records.trackers import Trackers
from tempflow.records.versions import write_versions
from tempflow.run.evaluation import Evaluator
from tempflow.run.folder import forget_errors
from tempflow.run.hacking import falls, keep_scores, read_scores
from tempflow.run.keeping import Keeper
from tempflow.run.lock import FolderLock
from tempflow.run.remaining import Remaining, Schedule
from tempflow.run.snapshot import Progress
from tempflow.run.trainer import Trainer
from tempflow.run.watch import Watch


class Journal:
    """The record of one run on one process; only the first one writes.

    Args:
        evaluator: None where there are no held-out prompts.
        lock: what keeps other processes out of the folder, given back by `close`.
    """

    def __init__(self, trainer: Trainer, folder: Path, evaluator: Evaluator | None, lock: FolderLock | None = None):
        self.trainer, self.folder, self.evaluator, self.lock = trainer, folder, evaluator, lock
        self.config, self.ranks = trainer.config, trainer.ranks
        self.keeper = Keeper(trainer, folder)
        self.progress = Progress()
        self.writer: MetricsWriter | None = None
        self.unwritten: Row | None = None
        self.iteration: IterationRow | None = None
        self.evaluation: EvaluationRow | None = None
        self.began = time.perf_counter()
        self.timed_out = False
        self.stopped_by: str | None = None
        """the signal for which all processes end together"""
        self.ending = False
        """what was learnt is being saved before the end"""
        self.watch = Watch(self.config.objective.clip)
        self.remaining = Remaining(Schedule.of(self.config))
        self.room = Room(self.config.eval.gallery, self.config.eval.gallery_mb * 1e6)

    def open(self, progress: Progress) -> None:
        """Begins the metrics of a new run, or goes on with those of a resumed one."""
        self.progress = progress
        self.remaining.resumed(progress.iteration, progress.evaluating)
        self.keeper.mark(progress, saved=not progress.unevaluated)
        if self.ranks.first:
            earlier = [row for row in read_metrics(self.folder / "metrics.jsonl") if row["step"] <= progress.iteration]
            self.watch = Watch(self.config.objective.clip, earlier)
            forget_errors(self.folder)
            self.keeper.clean_up()
            write_versions(self.folder)
            trackers = Trackers(self.folder, self.config.run.trackers, self.config.run.project, asdict(self.config))
            self.writer = MetricsWriter(self.folder, progress.iteration or None, progress.metrics_bytes, trackers)
        if not progress.iteration:
            self._write(self._start_row())

    def announce(self, progress: Progress) -> None:
        """Before the loop: says what there is to do yet, and where everything goes."""
        done, last = progress.iteration, self.config.learn.iterations
        say(f"writes to {self.folder}: iterations {done + 1} to {last}" if done < last else f"{self.folder} is done")

    def begin(self, progress: Progress) -> Progress:
        """Evaluates before the first iteration, or what a resumed run has not evaluated yet; time runs from here."""
        self.progress = progress
        if not progress.iteration:
            self._evaluate(progress)
        self.began = time.perf_counter() - progress.seconds
        self.timed_out = progress.iteration > 0 and self._past_limit(progress.seconds - progress.evaluating)
        if progress.unevaluated:
            return self.evaluate(progress)
        if progress.iteration and self.is_over(progress):  # a kill may have come between checkpoint and weights
            self.keeper.finish(progress)
        return progress

    def settled(self) -> bool:
        """Whether the run may be left just now: neither parameters nor the last checkpoint are being written."""
        return self.keeper.settled and not self.ending

    def is_over(self, progress: Progress) -> bool:
        """All is done, time is up, a signal asked for the end, or the reward is being hacked and that was to be one."""
        if progress.iteration >= self.config.learn.iterations or self.timed_out or self._hacked():
            return True
        asked = STOPPING.asked_by is not None
        if self.ranks.largest(torch.tensor([int(asked)])).item():
            self.stopped_by = STOPPING.asked_by or "a signal to another process"
        return self.stopped_by is not None

    def check_stop(self) -> None:
        """After the loop.

        Raises:
            Stopped: it ended since a signal asked for it.
        """
        if self.stopped_by is not None:
            raise Stopped(self.stopped_by)

    def record(self, row: IterationRow, progress: Progress, took: float) -> Progress:
        """Writes the line of an iteration that `took` so many seconds; returns how far the run has come."""
        trainer, branches = self.trainer, self.trainer.method.branches(self.config.explore.prompts)
        seconds, rollouts = time.perf_counter() - self.began, progress.rollouts + branches
        training, done = seconds - progress.evaluating, progress.iteration
        rows = progress.network_rows + network_rows(self.config, trainer.method, trainer.schedule, done,
                                                    trainer.policy.network_rows)  # fmt: skip
        self.progress = replace(progress, iteration=row.step, seconds=seconds, rollouts=rollouts, network_rows=rows,
                                unevaluated=True, tail_rows=trainer.tails[0].rows, gold=None)  # fmt: skip
        self.keeper.mark(self.progress)
        self.iteration = replace(row, seconds=round(seconds, 3), training_seconds=round(training, 3),
                                 rollouts=rollouts, network_rows=rows,
                                 rollouts_per_hour=round(branches / took * 3600, 1),
                                 phase_seconds=trainer.clock.read())  # fmt: skip
        found = self.watch.look(plain_row(self.iteration))
        for words in found.values():
            say(f"warning: iteration {row.step}: {words}")
        self.iteration = replace(self.iteration, warnings=sorted(found))
        self._write(self.iteration)
        self.remaining.iterated(took)
        self.timed_out = self._past_limit(training)
        return self.progress

    def _past_limit(self, training: float) -> bool:
        """Whether learn.max_seconds are over on any process."""
        limit = self.config.learn.max_seconds
        return limit is not None and bool(self.ranks.gather(torch.tensor([int(training >= limit)]), 0).any())

    def evaluate(self, progress: Progress) -> Progress:
        """After an iteration: evaluates and saves where that is due.

        Raises:
            BadInput: on all processes, where a scorer failed on one of them, or has no opinion at all.
        """
        done, every, save_every = progress.iteration, self.config.eval.every, self.config.run.save_every
        last, started = done == self.config.learn.iterations or self.timed_out, time.perf_counter()
        if last or (every and done % every == 0):
            self._evaluate(progress)
        now = time.perf_counter()
        self.progress = replace(progress, unevaluated=False, seconds=now - self.began,
                                evaluating=progress.evaluating + now - started, gold=self._gold(done))  # fmt: skip
        if last or self._hacked() or (save_every and done % save_every == 0):
            self.keeper.save(self.progress)
        return self.progress

    def _gold(self, step: int) -> float | None:
        """The first gold score of the evaluation after `step` iterations, if there was one."""
        if self.evaluator is None or self.evaluation is None or self.evaluation.step != step:
            return None
        return next((self.evaluation.scores.get(name) for name in self.evaluator.golds), None)

    def halted(self, error: BaseException) -> Exception | Stopped:
        """What a run ends with after `error`: saves what was learnt before, where that can be, and says so."""
        self.ending = True
        together = self.stopped_by is not None or isinstance(error, OneLine)
        told = self.keeper.rescue(self.progress, together, self._catch_up(), error)
        if together:  # where one process ends, torchrun ends the others, and the first may still be saving
            with suppress(RuntimeError):
                self.ranks.wait()
        if isinstance(error, KeyboardInterrupt):
            return Stopped(f"{str(error) or 'SIGINT'}: {told}")
        if isinstance(error, BadInput) and not self.progress.iteration:
            return error
        field, value, hint = as_line(error)
        return Halted(field, value, f"{hint}; {told}")

    def _catch_up(self) -> str:
        """Writes the line that could not be written; says why, if it still cannot."""
        try:
            self._write(None)
        except OSError as error:
            return error.strerror or str(error)
        return ""

    def shown(self) -> dict[str, str]:
        """What the progress bar says."""
        row, scores = self.iteration, self.evaluation.scores if self.evaluation else {}
        left = self.remaining.seconds(row.step, row.training_seconds)
        gold = scores.get("gold") if self.evaluation and self.evaluation.step == row.step else None
        known = {name: f"{value:.3f}" for name, value in (("reward", row.reward_mean), ("gold", gold))
                 if value is not None}  # fmt: skip
        ends = {"left": tqdm.format_interval(left)} if left is not None and not self.timed_out else {}
        return known | {"rollouts/h": f"{row.rollouts_per_hour:,.0f}"} | ends

    def measured(self) -> None:
        """After the first iteration: what the plan could only estimate."""
        device, size = self.trainer.policy.device, state_bytes(self.trainer.stepper.optimizer)
        words = f"measured: optimizer state {size / 2**20:,.1f} MiB"
        if device.type == "cuda":
            words += f", most GPU memory {torch.cuda.max_memory_allocated(device) / 2**30:.2f} GiB"
        say(words)

    def finish(self) -> None:
        """The last report, and the closing words."""
        self.keeper.finish()
        early = self.iteration is not None and self.iteration.step < self.config.learn.iterations
        word = "stopped, as reward.hacking_stop asks" if early and self._hacked() else "done"
        word = "stopped, as learn.max_seconds asks" if early and self.timed_out else word
        say(f"{word}; figures and pictures in {self.folder / 'report.html'} and report.png")

    def _hacked(self) -> bool:
        """Whether the last evaluation found the reward hacked, and the run was asked to stop then."""
        found = self.evaluation is not None and bool(self.evaluation.gold_fall)
        return found and self.config.reward.hacking_stop

    def close(self) -> None:
        """Ends the trackers, and gives the folder back."""
        self.keeper.saver.close()
        if self.writer is not None:
            self.writer.close()
        if self.lock is not None:
            self.lock.release()

    def _write(self, row: Row | None) -> None:
        """Writes a row, or the one that could not be written before."""
        self.unwritten = row or self.unwritten
        if self.writer is not None and self.unwritten is not None:
            self.writer.write(self.unwritten)
        self.unwritten = None

    def _start_row(self) -> StartRow:
        trainer, evaluator = self.trainer, self.evaluator
        shown = [evaluator.prompts[index].text for index in evaluator.pictured] if evaluator else []
        weights = trainer.method.objective.terms[:-1, WEIGHT].tolist()
        return StartRow(sigmas=trainer.schedule.sigmas.tolist(), loss_weights=weights, picture_prompts=shown,
                        tail_rows=trainer.tails[0].rows)  # fmt: skip

    def _evaluate(self, progress: Progress) -> None:
        """Held-out scores of the averaged parameters, and which gold fell; keeps pictures and scores."""
        if self.evaluator is None:
            return
        clock, step, started = self.trainer.clock, progress.iteration, time.perf_counter()
        with clock("evaluate"), self.trainer.stepper.average.applied():
            result = self.evaluator.evaluate(strict=not step)
        history, threshold = read_scores(self.folder, step), self.config.reward.hacking_drop
        fallen = falls(history, result.scores, self.evaluator.golds, threshold)
        seconds = round(time.perf_counter() - self.began, 3) if step else 0.0
        self.evaluation = EvaluationRow(step=step, seconds=seconds, scores=result.means(),
                                        scores_missing=result.missing, **result.lost, gold_fall=fallen or None,
                                        kinds=result.kinds or None,
                                        phase_seconds=clock.read())  # fmt: skip
        if self.ranks.first:
            save_pictures(self.folder, step, result.pictures)
            keep_small(self.folder, step, result.pictures, self.room)
            keep_scores(self.folder, step, result.scores)
        for name, fall in fallen.items():
            say(f"warning: iteration {step}: {name} is {fall:.4g} below its best while the reward rose; the model may "
                "please the scorer only: look at the pictures")  # fmt: skip
        self._write(self.evaluation)
        self.keeper.show()
        self.remaining.evaluated(time.perf_counter() - started)
