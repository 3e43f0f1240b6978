"""Evaluation: which prompts, which noises, which parameters, which pictures."""

import pytest
import torch

from tempflow.common.draws import EVALUATION, Draw
from tempflow.explore.tails.engine import EagerEngine
from tempflow.parallel.ranks import Ranks
from tempflow.prompts import Prompt
from tempflow.rewards.panel import Panel
from tempflow.run import assembly
from tempflow.run.evaluation import Evaluator
from tempflow.settings.fields import Config, EvalConfig, PromptConfig
from tempflow.train import main

TEXTS = ["a", "bb", "ccc", "dddd", "eeeee"]
CPU = torch.device("cpu")


class Brightness:
    """Scores a picture by its mean and the length of its prompt; remembers what it saw."""

    setting, name, parallel = "reward.name", "brightness", 0

    def __init__(self) -> None:
        self.images, self.prompts = [], []

    def __call__(self, images, prompts):
        self.images.append(images)
        self.prompts += [prompt.text for prompt in prompts]
        return images.float().mean((1, 2, 3)) + torch.tensor([1000.0 * len(prompt.text) for prompt in prompts])


def evaluator(policy, schedule, ranks: Ranks, pictures: int = 2) -> Evaluator:
    reward, gold = (Panel({"brightness": Brightness()}, torch.ones(1)) for _ in range(2))
    prompts = [Prompt(text) for text in TEXTS]
    return Evaluator(policy, EagerEngine(policy, 2), schedule, prompts, reward, gold, ranks, 7, 2, pictures)


class OneOf(Ranks):
    """One of two processes; what each would send is kept, to be put together afterwards."""

    def gather(self, values, dim):
        SENT.setdefault(self.rank, []).append((values, dim))
        return torch.cat([values, values], dim)


SENT: dict[int, list] = {}


def test_each_prompt_has_its_own_noise_that_is_no_noise_of_training(toy, schedule):
    found = evaluator(toy, schedule, Ranks(0, 1, CPU))
    result = found.evaluate()
    noises = Draw.grid(7, EVALUATION, range(5), 1).initial_noise(toy.latent_shape)
    EagerEngine(toy, 8).finish(noises, [0] * 5, toy.encode(TEXTS), schedule)
    expected = toy.decode(noises)
    images = found.rewards.scorers["brightness"].images[0]
    assert torch.equal(images, expected) and found.rewards.scorers["brightness"].prompts == TEXTS
    assert torch.equal(result.pictures, expected[[0, 2]]) and found.pictured == [0, 2]
    assert len({image.numpy().tobytes() for image in images}) == 5
    scores = [1000 * number + expected[number - 1].float().mean().item() for number in range(1, 6)]
    assert result.scores["gold"].tolist() == pytest.approx(scores)
    again = evaluator(toy, schedule, Ranks(0, 1, CPU)).evaluate()
    assert torch.equal(again.scores["gold"], result.scores["gold"])
    assert EVALUATION > 10**9, "no iteration of training has this number, and so its noises"


def test_two_processes_share_the_prompts_of_one(toy, schedule):
    """5 prompts: 3 on the first, 2 and a repeated one on the second; together they are what one process sees."""
    alone = evaluator(toy, schedule, Ranks(0, 1, CPU)).evaluate()
    SENT.clear()
    for rank in (0, 1):
        evaluator(toy, schedule, OneOf(rank, 2, CPU)).evaluate()
    tables = [next(values for values, dim in SENT[rank] if dim == 1) for rank in (0, 1)]
    assert torch.equal(torch.cat(tables, 1)[1, :5], alone.scores["gold"])
    pictures = torch.cat([SENT[rank][-1][0] for rank in (0, 1)]).amax(0)
    assert torch.equal(pictures, alone.pictures)


def test_held_out_prompts_are_spread_over_their_file(tmp_path):
    (tmp_path / "test.txt").write_text("\n".join(f"p{number}" for number in range(10)))
    config = Config(prompts=PromptConfig(test=str(tmp_path / "test.txt")), eval=EvalConfig(prompts=4))
    assert [prompt.text for prompt in assembly._held_out(config)] == ["p0", "p2", "p5", "p7"]
    assert assembly._held_out(Config(prompts=PromptConfig(test=None))) == []


def test_the_averaged_parameters_are_evaluated_and_saved(tmp_path, monkeypatch):
    """With an average that hardly moves, evaluation and the shipped adapters stay what they were."""
    from run.test_train import SMALL
    from safetensors.torch import load_file

    seen, evaluate = [], Evaluator.evaluate

    def watching(self):
        seen.append({name: value.detach().clone() for name, value in self.policy.trainable().items()})
        return evaluate(self)

    monkeypatch.setattr(Evaluator, "evaluate", watching)
    assert main([*SMALL, f"run.dir={tmp_path / 'run'}", "run.trackers=[]", "learn.iterations=2",
                 "model.lora_alpha=32"]) == 0  # fmt: skip
    last = tmp_path / "run" / "checkpoints" / "step_000002"
    average, trained = load_file(last / "average.safetensors"), load_file(last / "parameters.safetensors")
    assert len(seen) == 2 and all(torch.equal(seen[1][name], value) for name, value in average.items())
    assert any(not torch.equal(average[name], value) for name, value in trained.items())
    shipped = load_file(tmp_path / "run" / "pytorch_lora_weights.safetensors")
    sums = sorted(value.double().sum().item() for value in shipped.values())
    assert sums == sorted(value.double().sum().item() for value in average.values())
