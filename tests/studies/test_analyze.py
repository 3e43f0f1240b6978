"""The figures of an analysis against training steps that fork at one step alone, and its advice against its rules."""

import json

import pytest
import torch
from toy_trainer import make_trainer, panel_of, small, tilt

import tempflow.train
from tempflow.commands import analyze as command
from tempflow.common.errors import BadInput
from tempflow.settings.reading import load
from tempflow.studies.analyze.advice import (
    Advice,
    advise,
    choose_even_levels,
    choose_forks,
    choose_level,
    choose_siblings,
    even_weights,
)
from tempflow.studies.analyze.measure import (
    Spread,
    analysis_config,
    correlation,
    explore_once,
    measure_spread,
    measure_steps,
)
from tempflow.studies.analyze.report import Analysis

STACK = ("tempflow", "explore.noises=2", "explore.siblings=3")


def analyzed(*settings, judge=tilt):
    return make_trainer(analysis_config(small(*STACK, *settings)), panel_of((judge,), (1.0,)))[0]


def fixed(image, text):
    """Likes all images of a text alike."""
    return float(len(text))


def test_figures_are_those_of_a_training_step_that_forks_there_alone():
    figures, _ = measure_steps(analyzed(), tempflow.train.backward, 1)
    weights = analyzed().schedule.noise_weights(range(4))
    assert [figure.step for figure in figures] == [0, 1, 2, 3]
    for figure in figures:
        config = small(*STACK, f"explore.forks=[{figure.step}]", "objective.weighting=uniform")
        trainer, record = make_trainer(config, panel_of((tilt,), (1.0,)))
        rewards = explore_once(trainer, trainer.method, trainer.schedule, 0).rewards
        assert figure.reward_std == pytest.approx(rewards[0].double().std(1, correction=0).mean().item(), rel=1e-5)
        record.images.clear()
        row = tempflow.train.train_step(trainer, 0)
        norm = torch.cat([gradient.flatten() for gradient in record.gradients[0].values()]).norm().item()
        assert figure.gradient == pytest.approx(norm, rel=1e-5) and row.groups_masked == 0
        assert figure.weighted_gradient == pytest.approx(norm * weights[figure.step].item(), rel=1e-5)
        assert figure.zero_spread == 0 and figure.rows == 3 * (4 - figure.step) + 1


def test_measuring_moves_no_parameter():
    trainer = analyzed()
    before = {name: value.detach().clone() for name, value in trainer.policy.trainable().items()}
    measure_steps(trainer, tempflow.train.backward, 2)
    assert all(torch.equal(before[name], value) for name, value in trainer.policy.trainable().items())
    assert all(value.grad is None for value in trainer.policy.trainable().values())


def test_chains_are_analyzed_as_forks():
    explore = analysis_config(load(["digits", "flow_grpo"])).explore
    assert (explore.forks, explore.window, explore.siblings, explore.noises) == ("all", 1, 6, 24)


def test_more_noise_spreads_rewards_of_the_same_trunks():
    trainer = analyzed()
    low, same = measure_spread(trainer, 1 / 7, 1), measure_spread(trainer, 1.0, 1)
    _, spread = measure_steps(trainer, tempflow.train.backward, 1)
    assert torch.equal(same.rewards, spread.rewards) and (low.stds() < same.stds()).all()


def test_a_reward_without_spread_is_refused():
    with pytest.raises(BadInput, match="same score") as found:
        measure_steps(analyzed(judge=fixed), tempflow.train.backward, 1)
    assert found.value.field == "reward.name"


def test_correlation_is_pearsons():
    first, second = [1.0, 2.0, 4.0, 3.0], [0.5, 0.9, 1.1, 1.4]
    assert correlation(first, second) == pytest.approx(torch.corrcoef(torch.tensor([first, second]))[0, 1].item())


def spread_of(level, *stds, mean=0.0, trunks=2) -> Spread:
    """Four siblings at mean +- std."""
    signs = torch.tensor([1.0, -1.0, 1.0, -1.0])
    return Spread(level, mean + torch.tensor(stds)[:, None, None] * signs.expand(len(stds), trunks, 4))


def test_rules_of_the_advice():
    """Variances 9, 4, 1, 0.25 of 14.25: three forks hold .98, two .91."""
    forks, kept = choose_forks(spread_of(1, 3.0, 2.0, 1.0, 0.5))
    assert forks == (0, 1) and kept == pytest.approx(13 / 14.25)
    low, high, spoilt = spread_of(0.5, 1.0, 1.0), spread_of(1, 2.0, 2.0, mean=-0.9), spread_of(2, 3.0, 3.0, mean=-1.6)
    assert choose_level([low, high, spoilt]).level == 1
    rewards = torch.zeros(1, 10, 8)
    rewards[:, :, 5] = 1.0  # only the sixth sibling differs
    assert choose_siblings(Spread(1, rewards), [0]) == 6
    assert choose_siblings(Spread(1, torch.rand(1, 10, 8)), [0]) == 4


def test_even_noise_is_where_each_step_spreads_as_all_do_on_average():
    """Mean 2 at level 1: the first step reaches it at .5 already, the second between, the third not at 2 yet."""
    low, mid, high = spread_of(0.5, 2.0, 1.0, 0.1), spread_of(1, 4.0, 1.5, 0.5), spread_of(2, 6.0, 2.5, 1.0)
    assert choose_even_levels([low, mid, high], mid) == (0.5, 1.5, 2.0)


def test_even_weights_make_all_steps_pull_alike():
    found = even_weights([0.002, 0.004, 0.001])
    assert [weight * gradient for weight, gradient in zip(found, (0.002, 0.004, 0.001), strict=True)] == pytest.approx(
        [found[0] * 0.002] * 3, rel=1e-3
    )
    assert sum(found) == pytest.approx(3, abs=1e-3)
    assert even_weights([1.0, 0.0]) == pytest.approx([2 / 101, 200 / 101], abs=1e-4)


def test_even_noise_makes_spreads_even():
    trainer = analyzed("sample.noise_level=[0.4,0.6,0.8,1.0]")
    spreads = [measure_spread(trainer, factor, 1) for factor in (0.5, 1.0, 1.5)]
    levels = choose_even_levels(spreads, spreads[1])
    even = measure_spread(analyzed(f"sample.noise_level={list(levels)}"), 1.0, 1)
    assert even.stds().std() < 0.5 * spreads[1].stds().std() and even.level == levels


def test_the_recommendation_stacks_and_costs_what_it_says(tmp_path):
    """On a chain too, whose forks and window it replaces."""
    config = analysis_config(small(*STACK))
    trainer = make_trainer(config, panel_of((tilt,), (1.0,)))[0]
    steps, spread = measure_steps(trainer, tempflow.train.backward, 1)
    advice = advise(config, trainer.schedule, [spread])
    assert advice.rows == max(advice.forks) + 1 + sum(advice.siblings * (4 - step) + 1 for step in advice.forks)
    assert advice.rows_before == 4 + 3 * (4 + 3 + 2 + 1) + 4
    analysis = Analysis(steps, [spread], advice, 1)
    analysis.write(tmp_path)
    values = json.loads((tmp_path / "analysis.json").read_text())
    assert values["correlation"] == analysis.correlation and len(values["steps"]) == 4
    assert (tmp_path / "analysis.png").read_bytes().startswith(b"\x89PNG")
    for stack in (["digits"], ["digits", "flow_grpo"]):
        found = load([*stack, str(tmp_path / "recommended.yaml")])
        assert (found.explore.forks, found.explore.siblings) == (list(advice.forks), advice.siblings)
        assert (found.explore.window, found.sample.noise_level) == (1, advice.noise_level)
        weighting = load([*stack, str(tmp_path / "even_gradients.yaml")]).objective.weighting
        assert weighting == even_weights([step.gradient for step in steps])
        assert load([*stack, str(tmp_path / "even_noise.yaml")]).sample.noise_level == list(advice.even_levels)


def test_the_command(tmp_path, capsys, monkeypatch):
    def analyze(config, iterations):
        trainer = analyzed()
        steps, spread = measure_steps(trainer, tempflow.train.backward, iterations)
        return Analysis(steps, [spread], Advice((0, 1), 4, 0.7, 30, 60, 0.9, (0.6, 0.9)), 1)

    monkeypatch.setattr(command, "analyze", analyze)
    assert command.main(["digits", "--folder", str(tmp_path / "a"), "--iterations", "1", "explore.prompts=2"]) == 0
    assert "50 % saved" in capsys.readouterr().out and (tmp_path / "a" / "recommended.yaml").is_file()
    assert command.main(["digits", "--iterations", "0"]) == 2
    assert command.main(["dgits"]) == 2 and "preset=dgits" in capsys.readouterr().err
