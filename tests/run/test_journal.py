"""The loop and its record on a toy: what is written when, what a resumed run goes on with, when a run is over."""

import json
from dataclasses import replace

import pytest
import torch
from toy_trainer import SHAPE, make_trainer, panel_of, small, tilt

import tempflow.run.journal as journals
import tempflow.run.keeping as keeping
import tempflow.train
from tempflow.common.errors import BadInput, Halted
from tempflow.common.stopping import Stopped
from tempflow.parallel.ranks import Ranks
from tempflow.run.evaluation import Evaluation
from tempflow.run.journal import Journal
from tempflow.run.snapshot import Progress
from tempflow.train import train

SETTINGS = ["explore.noises=2", "explore.siblings=3", "explore.forks=[0,2]", "learn.iterations=5", "eval.every=2",
            "run.save_every=3", "run.keep_checkpoints=9", "run.trackers=[]", "objective.weighting=uniform",
            "learn.ema_decay=0.15", "learn.lr=0.01"]  # fmt: skip


class FakeEvaluator:
    """Scores that are given; remembers the parameters that it was asked about."""

    prompts, pictured, golds = [], [], ["gold"]

    def __init__(self, trainer, scores):
        self.trainer, self.scores, self.seen = trainer, iter(scores), []

    def evaluate(self, strict=False):
        self.seen.append(self.trainer.policy.scale.detach().clone())
        reward, gold = next(self.scores)
        spread = torch.linspace(-1e-3, 1e-3, 8)
        scores = {"reward_test": reward + spread, "gold": gold + spread.flip(0)}
        return Evaluation(scores, 0, torch.zeros(0, 3, 2, 4, dtype=torch.uint8))


@pytest.fixture
def journal(tmp_path, monkeypatch):
    """`journal(scores, *settings)`; pictures and weights are not written."""
    monkeypatch.setattr(keeping, "draw_report", lambda folder: None)
    monkeypatch.setattr(journals, "save_pictures", lambda folder, step, pictures: None)

    def make(scores=((0.0, 0.0),) * 9, *settings):
        trainer, _ = make_trainer(small(*SETTINGS, *settings), panel_of((tilt,), (1.0,)))
        trainer.policy.export = export
        made.append(Journal(trainer, tmp_path, FakeEvaluator(trainer, scores)))
        return made[-1]

    def export(write):
        saved.append(made[-1].trainer.policy.scale.detach().clone())
        return lambda folder: None

    made: list[Journal] = []

    saved: list[torch.Tensor] = []
    make.saved = saved
    return make


def lines(journal):
    return [json.loads(line) for line in (journal.folder / "metrics.jsonl").read_text().splitlines()]


def steps_of(journal, key):
    return [line["step"] for line in lines(journal) if key in line]


def checkpoints(journal):
    journal.keeper.wait()
    return [int(path.name[5:]) for path in sorted((journal.folder / "checkpoints").glob("step_*"))]


def test_a_run_evaluates_and_saves_when_due(journal):
    it = journal(((0.0, 0.0),) * 9, "objective.weighting=noise")
    it.open(Progress())
    train(it.trainer, it, Progress())
    assert steps_of(it, "gold") == [0, 2, 4, 5] and checkpoints(it) == [3, 5]
    assert steps_of(it, "grad_norm") == [1, 2, 3, 4, 5]
    rollouts = [line["rollouts"] for line in lines(it) if "grad_norm" in line]
    assert rollouts == [2 * 2 * 2 * 3 * count for count in range(1, 6)]
    per_iteration = 4 * 3 + 4 * 3 * (4 + 2) + 2 * 4  # trunks to fork 2, tails of 4 and 2 steps, a row per fork
    assert [line["network_rows"] for line in lines(it) if "grad_norm" in line] == [
        per_iteration * count for count in range(1, 6)]  # fmt: skip
    first = lines(it)[0]
    assert first["step"] == 0 and len(first["sigmas"]) == 6 and first["tail_rows"] == 7
    weights = first["loss_weights"]
    std = it.trainer.schedule.sde.std
    assert weights[1] == weights[3] == 0 and len(weights) == 4
    assert weights[0] == pytest.approx(float(2 * std[0] / (std[0] + std[2]))) and sum(weights) == pytest.approx(2)


def test_the_report_gets_the_weights_of_the_loss_in_use(journal):
    it = journal(((0.0, 0.0),) * 9, "objective.weighting=[0.5,2,1.5,3]")
    it.open(Progress())
    assert lines(it)[0]["loss_weights"] == [0.5, 0, 1.5, 0]


def test_evaluations_and_saved_weights_are_the_average(journal):
    it = journal()
    it.open(Progress())
    train(it.trainer, it, Progress())
    average, own = it.trainer.stepper.average.average["scale"], it.trainer.policy.scale
    assert torch.equal(it.evaluator.seen[-1], average) and torch.equal(journal.saved[-1], average)
    assert not torch.equal(average, own.detach())


def test_a_resumed_run_goes_on(journal):
    """No start line, no evaluation before; rollouts and seconds are counted on; lines after the checkpoint go."""
    it = journal()
    it.open(Progress())
    train(it.trainer, it, Progress())
    again = journal()
    progress = Progress(iteration=3, seconds=100.0, rollouts=72, tail_rows=7)
    again.open(progress)
    assert steps_of(again, "grad_norm") == [1, 2, 3] and steps_of(again, "sigmas") == [0]
    train(again.trainer, again, progress)
    assert steps_of(again, "grad_norm") == [1, 2, 3, 4, 5] and steps_of(again, "gold") == [0, 2, 4, 5]
    last = [line for line in lines(again) if "grad_norm" in line][-1]
    assert last["rollouts"] == 24 * 5 and last["seconds"] > 100


def test_what_a_failed_scorer_left_unevaluated_is_made_up_for(journal):
    it = journal()
    it.open(Progress())
    progress = it.begin(Progress(iteration=2, unevaluated=True))
    assert not progress.unevaluated and steps_of(it, "gold") == [2]
    assert it.begin(replace(progress, unevaluated=False)) == replace(progress, unevaluated=False)
    assert steps_of(it, "gold") == [2]


def test_a_run_ends_when_its_time_is_up(journal, monkeypatch):
    """Iterations of 10 s and evaluations of 100 s: the third iteration passes 25 s, and is evaluated and saved."""
    now = [0.0]
    monkeypatch.setattr(journals.time, "perf_counter", lambda: now[0])
    it = journal(((0.0, 0.0),) * 9, "learn.max_seconds=25")
    step, evaluate = tempflow.train.train_step, it.evaluator.evaluate

    def tick(work, seconds):
        def timed(*arguments, **options):
            now[0] += seconds
            return work(*arguments, **options)

        return timed

    monkeypatch.setattr(tempflow.train, "train_step", tick(step, 10))
    it.evaluator.evaluate = tick(evaluate, 100)
    told, shown = [], it.shown
    it.shown = lambda: told.append(shown()) or told[-1]
    it.open(Progress())
    train(it.trainer, it, Progress())
    assert steps_of(it, "gold") == [0, 2, 3] and checkpoints(it) == [3]
    assert [words.get("left") for words in told] == ["03:40", "01:50", None], "2 x (10 s + 100 s), then one, then none"
    seconds = [(line["seconds"], line["training_seconds"]) for line in lines(it) if "grad_norm" in line]
    assert seconds == [(10, 10), (20, 20), (130, 30)]
    saved = json.loads((it.folder / "checkpoints" / "step_000003" / "state.json").read_text())["progress"]
    again = journal(((0.0, 0.0),) * 9, "learn.max_seconds=25")
    train(again.trainer, again, Progress(**saved))
    assert again.iteration is None, "a resumed run has no more time"


@pytest.mark.parametrize("stop", [True, False])
def test_a_hacked_run_stops_where_it_was_asked_to(journal, stop):
    scores = ((0.0, 1.0), (1.0, 0.0), (2.0, 0.0), (3.0, 0.0))
    it = journal(scores, f"reward.hacking_stop={stop}")
    it.open(Progress())
    train(it.trainer, it, Progress())
    assert steps_of(it, "grad_norm")[-1] == (2 if stop else 5) and checkpoints(it) == ([2] if stop else [3, 5])
    falls = [line["gold_fall"] for line in lines(it) if "gold_fall" in line]
    assert falls[0] == {"gold": 1.0}


class Shared(Ranks):
    """The second of two processes with shares; `due` is what the first answers."""

    due = 1

    def gather(self, values, dim):
        return torch.cat([torch.full_like(values, self.due), values], dim)


@pytest.mark.parametrize("due", [0, 1])
def test_shares_are_gathered_by_all_or_by_nobody(tmp_path, monkeypatch, due):
    """The second process does not know whether the first has saved the iteration before the end came."""
    monkeypatch.setattr(Shared, "due", due)
    ranks = Shared(1, 2, torch.device("cpu"), in_step=True)
    trainer, _ = make_trainer(small(*SETTINGS), panel_of((tilt,), (1.0,)), ranks)
    keeper, gathered = keeping.Keeper(trainer, tmp_path), []
    keeper._prepared = gathered.append
    keeper.mark(Progress(3))
    keeper.rescue(Progress(3), True, "", Stopped("SIGTERM"))
    keeper.rescue(Progress(3), False, "", RuntimeError("gloo"))
    assert len(gathered) == due


@pytest.mark.parametrize("steps", [1, 2])
def test_half_of_an_iterations_steps_are_not_saved(tmp_path, steps):
    """A step that was refused has moved nothing; one before it in the same iteration has."""
    trainer, _ = make_trainer(small(*SETTINGS), panel_of((tilt,), (1.0,)))
    keeper, prepared = keeping.Keeper(trainer, tmp_path), []
    keeper._prepared = prepared.append
    keeper.mark(Progress(3))
    for _ in range(steps):
        trainer.stepper.optimizer.step()
    keeper.rescue(Progress(3), False, "", Halted("learn.skip_limit", 1, "not finite"))
    assert len(prepared) == (steps == 1)


def test_a_scorer_that_fails_saves_what_was_learnt(journal):
    it = journal()
    it.open(Progress())
    real, calls = it.trainer.rewards.check_opinions, []

    def fail_the_third_time(rewards):
        calls.append(1)
        if len(calls) == 3:
            raise BadInput("reward.name", "tilt", "is out of order")
        real(rewards)

    object.__setattr__(it.trainer.rewards, "check_opinions", fail_the_third_time)
    with pytest.raises(Halted, match="iteration 2 is saved"):
        train(it.trainer, it, Progress())
    assert checkpoints(it) == [2] and it.trainer.policy.latent_shape == SHAPE
    state = json.loads((it.folder / "checkpoints" / "step_000002" / "state.json").read_text())
    assert state["progress"]["iteration"] == 2 and not state["progress"]["unevaluated"]
