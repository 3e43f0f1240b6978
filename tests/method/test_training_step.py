"""The whole training step against nested loops over single images in float64, for settings that meet every branch."""

import math

import pytest
from oracle import Facts
from oracle_formulas import mean_and_std
from step_comparison import pair
from toy_trainer import choosy, curve, indifferent, shifted, small, tilt

SIGMAS = tuple(shifted(5).tolist())
OPTIMIZER = {"lr": 0.03, "betas": (0.8, 0.95), "eps": 3e-4, "weight_decay": 0.5, "max_norm": 0.012, "ema_decay": 0.15,
             "ema_every": 2}  # fmt: skip
IN_SETTINGS = ["learn.lr=0.03", "learn.betas=[0.8,0.95]", "learn.eps=3e-4", "learn.weight_decay=0.5",
               "learn.max_grad_norm=0.012", "learn.ema_decay=0.15", "learn.ema_every=2"]  # fmt: skip
TWO = ((tilt, curve), (1.0, 0.5))


def case(settings: str, judges=((tilt,), (1.0,)), **facts):
    return settings.split(), judges, facts


CASES = {
    "siblings of each fork, noise weights, KL": case(
        "explore.noises=2 explore.siblings=3 explore.forks=[0,2,3] objective.weighting=noise objective.kl=0.1 "
        "objective.clip=0.004 learn.inner_epochs=2",
        noises=2, siblings=3, pool=(0, 2, 3), weighting="noise", kl=0.1, clip=0.004, inner_epochs=2,
    ),
    "windows of siblings, two updates of trunks, KL by g": case(
        "explore.noises=2 explore.siblings=2 explore.forks=[0,1] explore.window=3 learn.updates=2 "
        "learn.inner_epochs=2 objective.kl=0.2 objective.kl_divisor=diffusion objective.weighting=inverse_step "
        "objective.clip=0.004",
        noises=2, siblings=2, pool=(0, 1), window=3, updates=2, inner_epochs=2, kl=0.2, kl_divisor="diffusion",
        weighting="inverse_step", clip=0.004,
    ),
    "chains of own noises, global std": case(
        "explore.noises=4 explore.siblings=1 explore.forks=[0] explore.window=rest credit.group=prompt "
        "credit.std=global objective.weighting=uniform objective.clip=0.004 learn.updates=2 learn.inner_epochs=2",
        noises=4, siblings=1, pool=(0,), window=4, group="prompt", std="global", clip=0.004, updates=2, inner_epochs=2,
    ),
    "one group of all, unbiased, tight limit": case(
        "explore.noises=2 explore.siblings=2 explore.forks=[0,3] credit.group=batch credit.std=unbiased "
        "credit.clip=0.8 objective.weighting=inverse_sensitivity objective.clip=0.004 learn.inner_epochs=3",
        noises=2, siblings=2, pool=(0, 3), group="batch", std="unbiased", limit=0.8, weighting="inverse_sensitivity",
        clip=0.004, inner_epochs=3,
    ),
    "forks that jump, each an optimizer step, two tails": case(
        "explore.noises=1 explore.siblings=4 explore.forks=[0,1,2] explore.jump=[1,3,2] tails.stride=[1,2] "
        "learn.updates_by=forks objective.weighting=noise credit.std=unbiased objective.clip=0.004 "
        "learn.inner_epochs=2",
        noises=1, siblings=4, pool=(0, 1, 2), jumps={1: 3, 2: 2}, strides=(1, 2), updates_by="forks",
        weighting="noise", std="unbiased", clip=0.004, inner_epochs=2,
    ),
    "windows across jumps, forks by trunk halves": case(
        "sample.steps=5 explore.noises=2 explore.siblings=2 explore.forks=[0,1] explore.jump=[2,1] explore.window=2 "
        "learn.updates=2 learn.updates_by=forks objective.weighting=inverse_step objective.kl=0.2 "
        "objective.kl_divisor=diffusion objective.clip=0.004",
        noises=2, siblings=2, pool=(0, 1), jumps={0: 2}, window=2, updates=2, updates_by="forks",
        weighting="inverse_step", kl=0.2, kl_divisor="diffusion", clip=0.004,
    ),
    "two scorers in one sum, some without an opinion, KL on idle groups": case(
        "explore.noises=2 explore.siblings=3 explore.forks=[0,2] reward.combine=sum objective.kl=0.3 "
        "objective.weighting=noise objective.clip=0.004",
        ((choosy, indifferent), (1.0, 0.5)),
        noises=2, siblings=3, pool=(0, 2), kl=0.3, weighting="noise", clip=0.004,
    ),
    "two scorers normalised each, idle groups dropped": case(
        "explore.noises=2 explore.siblings=3 explore.forks=[0,2] reward.combine=advantages credit.idle=drop "
        "objective.kl=0.3 objective.weighting=noise learn.updates=2 objective.clip=0.004 learn.inner_epochs=2",
        ((choosy, indifferent), (0.7, 0.5)),
        noises=2, siblings=3, pool=(0, 2), combine="advantages", idle="drop", kl=0.3, weighting="noise", updates=2,
        clip=0.004, inner_epochs=2,
    ),
    "two scorers normalised each, on two tails": case(
        "explore.noises=1 explore.siblings=4 explore.forks=[0,2] reward.combine=advantages tails.stride=[1,2] "
        "credit.clip=1.1 objective.clip=0.004",
        ((choosy, tilt), (0.3, 0.9)),
        noises=1, siblings=4, pool=(0, 2), combine="advantages", strides=(1, 2), limit=1.1, clip=0.004,
    ),
    "windows of siblings, idle groups dropped, KL by g, late forks": case(
        "explore.noises=2 explore.siblings=2 explore.forks=[1,2] explore.window=2 credit.idle=drop objective.kl=0.3 "
        "objective.kl_divisor=diffusion objective.weighting=uniform objective.clip=0.004",
        ((indifferent,), (1.0,)),
        noises=2, siblings=2, pool=(1, 2), window=2, idle="drop", kl=0.3, kl_divisor="diffusion", clip=0.004,
    ),
    "idle groups dropped without KL, trunk by trunk": case(
        "explore.noises=2 explore.siblings=2 explore.forks=[0,2] credit.idle=drop learn.updates=4 learn.rows=1 "
        "objective.weighting=uniform objective.clip=0.004",
        ((indifferent,), (1.0,)),
        noises=2, siblings=2, pool=(0, 2), idle="drop", updates=4, clip=0.004,
    ),
    "idle groups kept without KL, trunk by trunk": case(
        "explore.noises=2 explore.siblings=2 explore.forks=[0,2] learn.updates=4 learn.rows=1 "
        "objective.weighting=uniform objective.clip=0.004",
        ((indifferent,), (1.0,)),
        noises=2, siblings=2, pool=(0, 2), updates=4, clip=0.004,
    ),
    "idle groups kept with KL, trunk by trunk": case(
        "explore.noises=2 explore.siblings=2 explore.forks=[0,2] learn.updates=4 learn.rows=1 objective.kl=0.2 "
        "objective.weighting=uniform objective.clip=0.004",
        ((indifferent,), (1.0,)),
        noises=2, siblings=2, pool=(0, 2), updates=4, kl=0.2, clip=0.004,
    ),
    "a scorer of weight 0 whose silence does not matter": case(
        "explore.noises=1 explore.siblings=4 explore.forks=[1,2] objective.weighting=uniform objective.clip=0.004",
        ((tilt, choosy), (2.0, 0.0)), noises=1, siblings=4, pool=(1, 2), clip=0.004,
    ),
    "guard, prompt groups": case(
        "explore.noises=2 explore.siblings=2 explore.forks=[0,1,2,3] objective.ratio=guard credit.group=prompt "
        "objective.weighting=inverse_step objective.clip=0.002 learn.inner_epochs=3 reward.combine=advantages",
        TWO, noises=2, siblings=2, pool=(0, 1, 2, 3), ratio="guard", group="prompt", weighting="inverse_step",
        clip=0.002, inner_epochs=3, combine="advantages",
    ),
    "undivided CPS with KL, listed weights": case(
        "sample.transition=cps sample.noise_level=0.8 explore.noises=3 explore.siblings=2 explore.forks=[1] "
        "explore.window=rest objective.ratio=undivided objective.weighting=[0.5,2,1,3] objective.clip=0.002 "
        "objective.kl=0.05 learn.inner_epochs=3 credit.group=prompt learn.rows=3",
        kind="cps", level=0.8, noises=3, siblings=2, pool=(1,), window=3, ratio="undivided",
        weighting=(0.5, 2, 1, 3), clip=0.002, kl=0.05, inner_epochs=3, group="prompt",
    ),
    "noise of each step's own, in windows": case(
        "sample.noise_level=[0.9,0.3,1.1,0.6] explore.noises=2 explore.siblings=3 explore.forks=[0,2] explore.window=2 "
        "objective.weighting=noise objective.kl=0.1 objective.clip=0.004 learn.inner_epochs=3",
        level=(0.9, 0.3, 1.1, 0.6), noises=2, siblings=3, pool=(0, 2), window=2, weighting="noise", kl=0.1,
        clip=0.004, inner_epochs=3,
    ),
    "Dance-SDE, second-order tails": case(
        "sample.transition=dance_sde sample.noise_level=0.9 explore.noises=2 explore.siblings=3 explore.forks=[0,1] "
        "tails.solver=dpmpp_2m objective.weighting=noise objective.clip=0.01 learn.inner_epochs=2",
        kind="dance_sde", level=0.9, noises=2, siblings=3, pool=(0, 1), solver="dpmpp_2m", weighting="noise",
        clip=0.01, inner_epochs=2,
    ),
    "Flash-SDE, Adams tails of two lengths, last step dropped": case(
        "sample.transition=flash_sde sample.noise_level=1.1 explore.noises=2 explore.siblings=2 explore.forks=[0,1] "
        "tails.solver=adams_2 tails.stride=[1,2] tails.drop_below=0.5 objective.weighting=inverse_sensitivity "
        "objective.clip=0.004 learn.inner_epochs=2",
        kind="flash_sde", level=1.1, noises=2, siblings=2, pool=(0, 1), solver="adams_2", strides=(1, 2),
        drop_below=0.5, weighting="inverse_sensitivity", clip=0.004, inner_epochs=2,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_every_number_of_three_iterations(name):
    settings, (judges, weights), facts = CASES[name]
    config = small("objective.weighting=uniform", *IN_SETTINGS, *settings)
    both = pair(config, Facts(SIGMAS, run_seed=3, **OPTIMIZER, **facts), judges, weights)
    errors = both.run(3)
    errors.check()
    assert any(row.grad_norm > OPTIMIZER["max_norm"] for row in both.rows)
    if facts.get("inner_epochs", 1) > 1:
        below, above = errors.clipped
        total = sum(gain != 0 for _, gain in both.oracle.log_ratios)
        assert below and above and below + above < 0.8 * total


@pytest.mark.parametrize("name", [name for name in CASES if "scorer" in name or "idle" in name])
def test_the_cases_above_hold_missing_rewards_and_idle_groups(name):
    settings, (judges, weights), facts = CASES[name]
    config = small("objective.weighting=uniform", *IN_SETTINGS, *settings)
    both = pair(config, Facts(SIGMAS, run_seed=3, **OPTIMIZER, **facts), judges, weights)
    both.run(3)
    missing = sum(row.rewards_missing for row in both.rows)
    masked = sum(row.groups_masked for row in both.rows)
    assert (missing > 0) == (choosy in judges)
    assert masked == 0 if indifferent not in judges else 0 < masked < 24


def test_the_learning_rate_falls_in_a_straight_line():
    settings = ["explore.noises=2", "explore.siblings=3", "explore.forks=[0,2]", "learn.lr_schedule=linear",
                "learn.iterations=3", "objective.weighting=uniform", "objective.clip=0.004"]  # fmt: skip
    facts = Facts(SIGMAS, run_seed=3, noises=2, siblings=3, pool=(0, 2), clip=0.004, linear_until=3, **OPTIMIZER)
    pair(small(*IN_SETTINGS, *settings), facts, *TWO).run(3).check()


@pytest.mark.parametrize("decay, every", [(0.0, 3), (0.99, 1)])
def test_the_average_without_a_limit_and_without_an_average(decay, every):
    settings = ["explore.noises=2", "explore.siblings=3", "explore.forks=[0,2]", f"learn.ema_decay={decay}",
                f"learn.ema_every={every}", "objective.weighting=uniform", "objective.clip=0.004"]  # fmt: skip
    own = OPTIMIZER | {"ema_decay": decay, "ema_every": every}
    facts = Facts(SIGMAS, run_seed=3, noises=2, siblings=3, pool=(0, 2), clip=0.004, **own)
    pair(small(*IN_SETTINGS, *settings), facts, *TWO).run(3).check()


@pytest.mark.parametrize("rows, chunk", [(1, 1), (4, 3), (2, 50)])
def test_batches_change_nothing(rows, chunk):
    settings, (judges, weights), facts = CASES["windows of siblings, two updates of trunks, KL by g"]
    updates = 1 if rows == 4 else 2
    config = small(*IN_SETTINGS, *settings, f"learn.rows={rows}", f"learn.updates={updates}")
    facts = facts | {"updates": updates}
    both = pair(config, Facts(SIGMAS, run_seed=3, **OPTIMIZER, **facts), judges, weights)
    object.__setattr__(both.trainer.tails[0], "rows", chunk)
    both.run(2).check()


def test_the_figures_are_those_of_the_oracle():
    settings, (judges, weights), facts = CASES["siblings of each fork, noise weights, KL"]
    both = pair(small(*IN_SETTINGS, *settings), Facts(SIGMAS, run_seed=3, **OPTIMIZER, **facts), judges, weights)
    both.run(1)
    row, seen = both.rows[0], both.oracle.log_ratios
    assert row.first_log_ratio_max == 0.0 and row.first_log_ratio_mean == 0.0
    excess = [math.expm1(log_ratio) for log_ratio, _ in seen]
    outside = [abs(value) > facts["clip"] for value in excess]
    assert row.clip_fraction == pytest.approx(sum(outside) / len(outside))
    assert row.ratio_max == pytest.approx(1 + max(excess), rel=1e-5)
    assert row.ratio_mean == pytest.approx(1 + sum(excess) / len(excess), rel=1e-6)
    assert row.log_ratio_max == pytest.approx(max(abs(log_ratio) for log_ratio, _ in seen), rel=1e-4)
    assert row.reward_mean == pytest.approx(
        sum(weights[0] * branch.rewards[0][0] for branch in both.last) / len(both.last), rel=1e-5
    )
    assert row.groups_masked == 0 and row.rewards_missing == 0 and row.step == 1


def test_the_spread_of_rewards_at_each_step_is_that_among_siblings():
    settings = ["explore.noises=2", "explore.siblings=3", "explore.forks=[0,2]", "tails.stride=[1,2]"]
    facts = Facts(SIGMAS, run_seed=3, noises=2, siblings=3, pool=(0, 2), strides=(1, 2), **OPTIMIZER)
    both = pair(small(*IN_SETTINGS, *settings, "objective.weighting=uniform"), facts, *TWO)
    both.run(1).check()
    spreads = {0: [], 1: []}
    for first in both.last[::3]:
        family = [b for b in both.last if (b.fork, b.prompt, b.noise) == (first.fork, first.prompt, first.noise)]
        for tail in range(2):
            sums = [b.rewards[tail][0] + 0.5 * b.rewards[tail][1] for b in family]
            spreads[first.fork].append(mean_and_std(sums, unbiased=False)[1])
    expected = [sum(spreads[fork]) / len(spreads[fork]) for fork in (0, 1)]
    found = both.rows[0].reward_std_per_step
    assert len(found) == 4 and found[1] is None and found[3] is None
    assert [found[0], found[2]] == pytest.approx(expected, abs=1e-5)
    means = [sum(b.rewards[t][s] for b in both.last for t in range(2)) / (2 * len(both.last)) for s in range(2)]
    assert list(both.rows[0].reward_means.values()) == pytest.approx(means, rel=1e-5)
    assert both.rows[0].reward_mean == pytest.approx(means[0] + 0.5 * means[1], rel=1e-5)
