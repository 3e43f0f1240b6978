"""What a run writes and says: metrics, evaluations, checkpoints, pictures, words."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import torch

from tempflow.common.errors import BadInput, Halted
from tempflow.common.say import say
from tempflow.forecast.cost import network_rows
from tempflow.learn.objective import WEIGHT
from tempflow.learn.optimizers import state_bytes
from tempflow.records.figures import draw_report, save_pictures
from tempflow.records.rows import EvaluationRow, IterationRow, MetricsWriter, Row, StartRow, plain_row, read_metrics
from tempflow.run import checkpoint
from tempflow.run.checkpoint import Progress
from tempflow.run.evaluation import Evaluator
from tempflow.run.hacking import falls, keep_scores, read_scores
from tempflow.run.trainer import Trainer
from tempflow.run.watch import Watch


class Journal:
    """The record of one run on one process; only the first one writes.

    Args:
        evaluator: None where there are no held-out prompts.
    """

    def __init__(self, trainer: Trainer, folder: Path, evaluator: Evaluator | None):
        self.trainer, self.folder, self.evaluator = trainer, folder, evaluator
        self.config, self.ranks = trainer.config, trainer.ranks
        self.writer: MetricsWriter | None = None
        self.iteration: IterationRow | None = None
        self.evaluation: EvaluationRow | None = None
        self.began = time.perf_counter()
        self.timed_out = False
        self.watch = Watch(self.config.objective.clip)

    def open(self, progress: Progress) -> None:
        """Begins the metrics of a new run, or goes on with those of a resumed one."""
        if self.ranks.first:
            last = progress.iteration or None
            earlier = [row for row in read_metrics(self.folder / "metrics.jsonl") if row["step"] <= progress.iteration]
            self.watch = Watch(self.config.objective.clip, earlier)
            self.writer = MetricsWriter(self.folder, self.config.run.trackers, self.folder.name, last)
        if not progress.iteration:
            self._write(self._start_row())

    def begin(self, progress: Progress) -> Progress:
        """Evaluates before the first iteration, or what a resumed run has not evaluated yet; time runs from here."""
        if not progress.iteration:
            self._evaluate(progress)
        self.began = time.perf_counter() - progress.seconds
        self.timed_out = progress.iteration > 0 and self._past_limit(progress.seconds - progress.evaluating)
        return self.evaluate(progress) if progress.unevaluated else progress

    def is_over(self, progress: Progress) -> bool:
        """All iterations are done, time is up, or the reward is being hacked and the run was asked to stop then."""
        return progress.iteration >= self.config.learn.iterations or self.timed_out or self._hacked()

    def record(self, row: IterationRow, progress: Progress, took: float) -> Progress:
        """Writes the line of an iteration that `took` so many seconds; returns how far the run has come."""
        trainer, branches = self.trainer, self.trainer.method.branches(self.config.explore.prompts)
        seconds, rollouts = time.perf_counter() - self.began, progress.rollouts + branches
        training, done = seconds - progress.evaluating, progress.iteration
        rows = progress.network_rows + network_rows(self.config, trainer.method, trainer.schedule, done,
                                                    trainer.policy.network_rows)  # fmt: skip
        self.timed_out = self._past_limit(training)
        self.iteration = replace(row, seconds=round(seconds, 3), training_seconds=round(training, 3),
                                 rollouts=rollouts, network_rows=rows,
                                 rollouts_per_hour=round(branches / took * 3600, 1),
                                 phase_seconds=trainer.clock.read())  # fmt: skip
        found = self.watch.look(plain_row(self.iteration))
        for words in found.values():
            say(f"warning: iteration {row.step}: {words}")
        self.iteration = replace(self.iteration, warnings=sorted(found))
        self._write(self.iteration)
        return replace(progress, iteration=row.step, seconds=seconds, rollouts=rollouts, network_rows=rows,
                       unevaluated=True, tail_rows=trainer.tails[0].rows)  # fmt: skip

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
        progress = replace(progress, unevaluated=False, seconds=now - self.began,
                           evaluating=progress.evaluating + now - started)  # fmt: skip
        if last or self._hacked() or (save_every and done % save_every == 0):
            self.save(progress)
        return progress

    def save(self, progress: Progress) -> None:
        """A checkpoint, the trained weights (averaged) in the model library's own format, and the report so far."""
        first = self.ranks.first
        if first or self.ranks.in_step:  # what is shared out is gathered by all
            stepper, keep = self.trainer.stepper, self.config.run.keep_checkpoints
            checkpoint.save(self.folder / "checkpoints", progress, stepper, keep, write=first)
            with stepper.average.applied():
                self.trainer.policy.save(self.folder, write=first)
        if first:
            draw_report(self.folder)
        self.ranks.wait()

    def halted(self, progress: Progress, error: BadInput) -> Halted:
        """Saves what was learnt before images got no score, and says so."""
        hint = error.hint
        if progress.iteration:
            self.save(progress)
            hint += f"; iteration {progress.iteration} is saved, go on with run.resume=true"
        return Halted(error.field, error.value, hint)

    def shown(self) -> dict[str, str]:
        """What the progress bar says."""
        row, scores = self.iteration, self.evaluation.scores if self.evaluation else {}
        gold = scores.get("gold") if self.evaluation and self.evaluation.step == row.step else None
        known = {name: f"{value:.3f}" for name, value in (("reward", row.reward_mean), ("gold", gold))
                 if value is not None}  # fmt: skip
        return known | {"rollouts/h": f"{row.rollouts_per_hour:,.0f}"}

    def measured(self) -> None:
        """After the first iteration: what the plan could only estimate."""
        device, size = self.trainer.policy.device, state_bytes(self.trainer.stepper.optimizer)
        words = f"measured: optimizer state {size / 2**20:,.1f} MiB"
        if device.type == "cuda":
            words += f", most GPU memory {torch.cuda.max_memory_allocated(device) / 2**30:.2f} GiB"
        say(words)

    def finish(self) -> None:
        """The closing words."""
        early = self.iteration is not None and self.iteration.step < self.config.learn.iterations
        word = "stopped, as reward.hacking_stop asks" if early and self._hacked() else "done"
        word = "stopped, as learn.max_seconds asks" if early and self.timed_out else word
        say(f"{word}; figures and pictures in {self.folder / 'report.png'}")

    def _hacked(self) -> bool:
        """Whether the last evaluation found the reward hacked, and the run was asked to stop then."""
        found = self.evaluation is not None and bool(self.evaluation.gold_fall)
        return found and self.config.reward.hacking_stop

    def _write(self, row: Row) -> None:
        if self.writer is not None:
            self.writer.write(row)

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
        clock, step = self.trainer.clock, progress.iteration
        with clock("evaluate"), self.trainer.stepper.average.applied():
            result = self.evaluator.evaluate(strict=not step)
        history, threshold = read_scores(self.folder, step), self.config.reward.hacking_drop
        fallen = falls(history, result.scores, self.evaluator.golds, threshold)
        seconds = round(time.perf_counter() - self.began, 3) if step else 0.0
        self.evaluation = EvaluationRow(step=step, seconds=seconds, scores=result.means(),
                                        scores_missing=result.missing, **result.lost, gold_fall=fallen or None,
                                        phase_seconds=clock.read())  # fmt: skip
        if self.ranks.first:
            save_pictures(self.folder, step, result.pictures)
            keep_scores(self.folder, step, result.scores)
        for name, fall in fallen.items():
            say(f"warning: iteration {step}: {name} is {fall:.4g} below its best while the reward rose; the model may "
                "please the scorer only: look at the pictures")  # fmt: skip
        self._write(self.evaluation)
