"""Evaluation: which prompts, which noises, which parameters, which pictures."""

from dataclasses import replace

import pytest
import torch

from tempflow.common.draws import EVALUATION, Draw
from tempflow.explore.tails.engine import EagerEngine
from tempflow.parallel.ranks import Ranks
from tempflow.prompts import Prompt
from tempflow.rewards.panel import Panel
from tempflow.run import assembly
from tempflow.run.evaluation import MOST_KINDS, Evaluator, means_by_kind
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


class Choosy(Brightness):
    """Says what it is told to."""

    def __init__(self, opinions) -> None:
        self.opinions = opinions

    def __call__(self, images, prompts):
        return self.opinions


def evaluator(policy, schedule, ranks: Ranks, pictures: int = 2, noises: int = 1) -> Evaluator:
    reward, gold = (Panel({"brightness": Brightness()}, torch.ones(1)) for _ in range(2))
    prompts = [Prompt(text) for text in TEXTS]
    return Evaluator(policy, EagerEngine(policy, 2), schedule, prompts, reward, gold, ranks, 7, noises, policy, 2,
                     pictures)  # fmt: skip


class OneOf(Ranks):
    """One of two processes; what each would send is kept, to be put together afterwards."""

    def gather(self, values, dim):
        SENT.setdefault(self.rank, []).append((values, dim))
        return torch.cat([values, values], dim)


SENT: dict[int, list] = {}


def test_golds_are_told_by_kind_of_prompt(toy, schedule):
    """GenEval's metadata say `tag`; a prompt of no kind counts in the whole only, like one without an opinion."""
    kinds = ({"kind": "counts"}, {"tag": "pairs"}, {}, {"kind": "counts"}, {"tag": "none known"})
    prompts = [Prompt(text, metadata) for text, metadata in zip(TEXTS, kinds, strict=True)]
    result = replace(evaluator(toy, schedule, Ranks(0, 1, CPU)), prompts=prompts).evaluate()
    gold, reward = result.scores["gold"], result.scores["reward_test"]
    assert {name: value for name, value in result.kinds.items() if name.startswith("gold")} == {
        "gold/counts": gold[[0, 3]].mean().item(), "gold/pairs": gold[1].item(), "gold/none known": gold[4].item()
    }  # fmt: skip
    assert result.kinds["reward_test/counts"] == reward[[0, 3]].mean().item() and len(result.kinds) == 6
    gold[4] = torch.nan
    assert set(means_by_kind({"gold": gold}, prompts)) == {"gold/counts", "gold/pairs"}
    alone = [Prompt("a", {"kind": "counts"})] * 4
    for alike in ([Prompt("a")] * 5, [*alone, alone[0]], [*alone, Prompt("a")], [*alone, Prompt("a", {"kind": 3})]):
        assert means_by_kind({"gold": gold}, alike) == {}
    numbered = [Prompt("a", {"tag": str(number)}) for number in range(MOST_KINDS + 1)]
    assert means_by_kind({"gold": torch.ones(MOST_KINDS + 1)}, numbered) == {}
    assert len(means_by_kind({"gold": torch.ones(MOST_KINDS)}, numbered[1:])) == MOST_KINDS
    assert Prompt("a", {"kind": "", "tag": "two"}).kind == "two"


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


@pytest.mark.parametrize("noises", [1, 3])
def test_two_processes_share_the_prompts_of_one(toy, schedule, noises):
    """5 prompts: 3 on the first, 2 and a repeated one on the second; together they are what one process sees."""
    alone = evaluator(toy, schedule, Ranks(0, 1, CPU), noises=noises).evaluate()
    SENT.clear()
    for rank in (0, 1):
        evaluator(toy, schedule, OneOf(rank, 2, CPU), noises=noises).evaluate()
    tables = [next(values for values, dim in SENT[rank] if dim == 1) for rank in (0, 1)]
    images = torch.cat(tables, 1)[1, : 5 * noises].view(5, noises)
    assert torch.equal(images.mean(1), alone.scores["gold"])
    pictures = torch.cat([SENT[rank][-1][0] for rank in (0, 1)]).amax(0)
    assert torch.equal(pictures, alone.pictures)


def test_scores_are_means_over_the_noises_of_a_prompt(toy, schedule):
    """Of three noises, too, the first is the one that a single noise is, and the one that pictures show."""
    one, several = (evaluator(toy, schedule, Ranks(0, 1, CPU), noises=count) for count in (1, 3))
    first, mean = one.evaluate(), several.evaluate()
    judge = several.gold.scorers["brightness"]
    assert judge.prompts == [text for text in TEXTS for _ in range(3)]
    scores = judge.images[0].float().mean((1, 2, 3)).view(5, 3) + torch.arange(1, 6)[:, None] * 1000.0
    assert mean.scores["gold"].tolist() == pytest.approx(scores.mean(1).tolist())
    assert scores[:, 0].tolist() == pytest.approx(first.scores["gold"].tolist())
    assert (scores.std(1) > 0).all() and torch.equal(mean.pictures, first.pictures)


def test_a_missing_opinion_leaves_the_others_of_a_prompt(toy, schedule):
    opinions = torch.tensor([1.0, 3.0, float("nan"), 5.0, 2.0, 2.0, float("nan"), float("nan"), 0.0, 1.0])
    choosy = Panel({"choosy": Choosy(opinions)}, torch.ones(1))
    found = replace(evaluator(toy, schedule, Ranks(0, 1, CPU), noises=2), gold=choosy)
    result = found.evaluate()
    assert result.scores["gold"].tolist() == pytest.approx([2, 5, 2, float("nan"), 0.5], nan_ok=True)
    assert result.missing == 3


def test_noises_of_evaluation_do_not_depend_on_the_run_seed(tmp_path):
    """Runs of two run seeds begin from the same scores; another eval.seed gives others."""
    from small_runs import SMALL

    from tempflow.run.hacking import read_scores

    scores = {}
    for name, *settings in (("one", "run.seed=1"), ("two", "run.seed=2"), ("other", "run.seed=1", "eval.seed=9")):
        assert main([*SMALL, f"run.dir={tmp_path / name}", "run.trackers=[]", "learn.iterations=1", *settings]) == 0
        scores[name] = read_scores(tmp_path / name, 1)[0]["reward_test"]
    assert torch.equal(scores["one"], scores["two"]) and not torch.equal(scores["one"], scores["other"])


def test_held_out_prompts_are_spread_over_their_file(tmp_path):
    (tmp_path / "test.txt").write_text("\n".join(f"p{number}" for number in range(10)))
    config = Config(prompts=PromptConfig(test=str(tmp_path / "test.txt")), eval=EvalConfig(prompts=4))
    assert [prompt.text for prompt in assembly.held_out_prompts(config)] == ["p0", "p2", "p5", "p7"]
    assert assembly.held_out_prompts(Config(prompts=PromptConfig(test=None))) == []


def test_the_averaged_parameters_are_evaluated_and_saved(tmp_path, monkeypatch):
    """With an average that hardly moves, evaluation and the shipped adapters stay what they were."""
    from safetensors.torch import load_file
    from small_runs import SMALL

    seen, evaluate = [], Evaluator.evaluate

    def watching(self, **options):
        seen.append({name: value.detach().clone() for name, value in self.policy.trainable().items()})
        return evaluate(self, **options)

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
