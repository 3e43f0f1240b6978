"""Every preset of a method against an oracle that was told of the method by hand, from its paper and released code."""

import pytest
import torch
from conftest import SD35_SIGMAS
from oracle import Facts
from step_comparison import pair
from toy_trainer import curve, shifted, small, tilt

from tempflow.explore.tails.solver import tail_solvers
from tempflow.method import read_method
from tempflow.settings.reading import load

STEPS = 8
CHAIN = {"pool": (0,), "window": STEPS - 1, "noises": 4, "siblings": 1, "group": "prompt", "std": "global"}
FIRST_HALF = (0, 1, 2, 3)
PAPERS = {
    "tempflow": {"noises": 2, "siblings": 3, "pool": tuple(range(STEPS - 1)), "weighting": "noise"},
    "flow_grpo": CHAIN,
    "flow_grpo_prompt": CHAIN | {"std": "group"},
    "flow_grpo_fast": {"kind": "cps", "level": 0.8, "noises": 4, "siblings": 1, "pool": FIRST_HALF, "window": 2,
                       "group": "prompt", "std": "global", "ratio": "undivided"},
    "mixgrpo": {"noises": 1, "siblings": 4, "pool": FIRST_HALF, "window": 4, "std": "unbiased"},
    "mixgrpo_flash": {"noises": 1, "siblings": 4, "window": 4, "std": "unbiased", "solver": "dpmpp_2m",
                      "strides": (3,)},
    "dance_grpo": {"kind": "dance_sde", "level": 0.3, "noises": 1, "siblings": 4, "window": STEPS - 1,
                   "std": "unbiased"},
    "g2rpo": {"noises": 1, "siblings": 4, "pool": FIRST_HALF, "strides": (1, 2), "std": "unbiased",
              "updates_by": "forks"},
    "flash_grpo": {"kind": "flash_sde", "level": 1.0, "noises": 4, "siblings": 1, "pool": FIRST_HALF,
                   "group": "prompt", "weighting": "inverse_sensitivity"},
    "flow_cps": CHAIN | {"kind": "cps", "level": 0.8, "ratio": "undivided"},
    "egrpo": {"noises": 1, "siblings": 4, "pool": (0, 1, 2), "jumps": {2: 2}, "strides": (1, 2), "std": "unbiased",
              "updates_by": "forks"},
}  # fmt: skip
"""What each is, at 8 steps (MixGRPO-Flash: 12, so that its tails have steps of second order)."""

GUARD = {"ratio": "guard", "weighting": "inverse_step"}
STACKS = {(name,): facts for name, facts in PAPERS.items()} | {
    ("tempflow", "guard"): PAPERS["tempflow"] | GUARD,
    ("flow_grpo", "guard"): CHAIN | GUARD,
}
NARROW = {"gaussian": 4e-3, "guard": 1e-3, "undivided": 1e-3}
"""Ratios of six elements are wider than those of a picture, so clips are too."""
ITERATIONS = {"mixgrpo": (0, 25, 80), "flash_grpo": (0, 1, 2, 3, 4)}


def settings_of(facts, iterations_of_learning=2):
    count, clip = facts["siblings"], NARROW[facts.get("ratio", "gaussian")]
    return [f"sample.steps={12 if facts.get('solver') else STEPS}", f"explore.noises={facts['noises']}",
            f"explore.siblings={count}", "learn.lr=0.02", f"learn.inner_epochs={iterations_of_learning}",
            f"objective.clip={clip}"]  # fmt: skip


@pytest.mark.parametrize("stack", STACKS, ids=" ".join)
def test_a_preset_is_its_paper(stack):
    """Images, advantages, and gradients before and after a finite move, as differences of two log-probabilities."""
    facts = STACKS[stack]
    sigmas = tuple(shifted(12 if facts.get("solver") else STEPS).tolist())
    given = {"clip": NARROW[facts.get("ratio", "gaussian")], "lr": 0.02, "inner_epochs": 2, "run_seed": 3}
    both = pair(small(*stack, *settings_of(facts)), Facts(sigmas, **facts, **given), (tilt,), (1.0,))
    for iteration in ITERATIONS.get(stack[0], (0, 1)):
        both.iterate(iteration)
    both.errors.check()
    assert len(both.last) == both.trainer.method.branches(both.trainer.config.explore.prompts)
    assert all(row.first_log_ratio_max == 0.0 for row in both.rows)
    assert max(abs(value) for value, _ in both.oracle.log_ratios) > 1e-4


def test_several_rewards_of_mixgrpo_are_normalised_one_by_one():
    facts = PAPERS["mixgrpo"] | {"combine": "advantages", "clip": 4e-3, "lr": 0.02, "inner_epochs": 2, "run_seed": 3}
    config = small("mixgrpo", *settings_of(PAPERS["mixgrpo"]), "reward.combine=advantages")
    pair(config, Facts(tuple(shifted(STEPS).tolist()), **facts), (tilt, curve), (0.75, 0.25)).run(2).check()


RELEASED = {
    # noises, siblings, noise level, clip
    "flow_grpo": (24, 1, 0.7, 1e-4),
    "flow_grpo_prompt": (24, 1, 0.7, 1e-4),
    "flow_grpo_fast": (24, 1, 0.8, 1e-5),
    "mixgrpo": (1, 12, 0.7, 1e-4),
    "mixgrpo_flash": (1, 12, 0.7, 1e-4),
    "dance_grpo": (1, 12, 0.3, 1e-4),
    "g2rpo": (1, 12, 0.7, 1e-4),
    "flash_grpo": (8, 1, 1.0, 1e-3),
    "flow_cps": (24, 1, 0.8, 1e-5),
    "egrpo": (1, 12, 0.7, 1e-4),
}


@pytest.mark.parametrize("name", RELEASED)
def test_numbers_of_the_released_settings(name):
    config = load(["digits", name])
    explore = config.explore
    numbers = (explore.noises, explore.siblings, config.sample.noise_level, config.objective.clip)
    assert numbers == RELEASED[name] and config.credit.clip == 5.0


def test_guard_on_top_changes_the_objective_only():
    plain, guarded = load(["digits", "flow_grpo"]), load(["digits", "flow_grpo", "guard"])
    assert (plain.explore, plain.credit, plain.sample) == (guarded.explore, guarded.credit, guarded.sample)
    assert guarded.objective.clip == 2e-6 and plain.objective.clip == 1e-4


def method_of(sigmas, *arguments):
    config = load(["digits", *arguments, f"sample.steps={len(sigmas) - 1}"])
    return config, *read_method(config, torch.as_tensor(sigmas, dtype=torch.float64))


def test_tempflow_weights_of_sd35():
    """Those of the paper's normalisation on SD3.5 at ten steps, and the released constant 2.25 = 1 / mean std."""
    _, method, schedule = method_of(SD35_SIGMAS, "tempflow")
    expected = [1.577, 1.673, 1.208, 1.004, 0.882, 0.795, 0.719, 0.635, 0.508]
    assert method.objective.terms[:9, 0].tolist() == pytest.approx(expected, abs=2e-3)
    assert (1 / schedule.sde.std[:9].mean()).item() == pytest.approx(2.252, abs=1e-3)
    assert not method.objective.terms[9].any()


def test_flash_weights_are_the_released_table():
    """Ten numbers of the released code for Wan2.1, by time; here they have mean 1."""
    released = [7.4770, 7.0414, 6.6112, 6.1867, 5.7682, 5.3559, 4.9502, 4.5513, 4.1596, 3.7754]
    t = 0.999 * torch.arange(20, -1, -1, dtype=torch.float64) / 20
    sigmas = 3 * t / (1 + 2 * t)
    assert [int(1000 * sigma) for sigma in sigmas[:10]] == [999, 982, 963, 944, 922, 899, 874, 847, 817, 785]
    _, method, _ = method_of(sigmas, "flash_grpo")
    mean = sum(released) / 10
    assert method.objective.terms[:10, 0].tolist() == pytest.approx([value / mean for value in released], rel=2e-5)
    assert not method.objective.terms[10:].any()


def test_guard_terms():
    """Its log-ratio is mean(eps * dmu), and weights are 1 over the step size."""
    sigmas = shifted(10)
    for base in ("tempflow", "flow_grpo"):
        _, method, schedule = method_of(sigmas, base, "guard")
        weight, square, product, _ = method.objective.terms[:9].unbind(1)
        sizes = sigmas[:9] - sigmas[1:10]
        assert torch.allclose(weight, (1 / sizes) / (1 / sizes).mean(), rtol=1e-12)
        assert not square.any() and torch.equal(product, schedule.sde.v_coef[:9])


def test_tails_have_as_many_steps_as_the_released_ones():
    """G2RPO at 16 steps: 8 7 7 6 6 5 5 4 calls of the coarse tail; MixGRPO-Flash at 25: 7, its .4 of 21."""
    config, method, schedule = method_of(shifted(16), "g2rpo")
    fine, coarse = (solver.table(schedule).lengths for solver in tail_solvers(config.tails))
    assert method.rule.forks.pool == tuple(range(8))
    assert [coarse[fork + 1] for fork in range(8)] == [8, 7, 7, 6, 6, 5, 5, 4]
    assert [fine[fork + 1] for fork in range(8)] == [15 - fork for fork in range(8)]
    config, method, schedule = method_of(shifted(25), "mixgrpo_flash")
    solver = tail_solvers(config.tails)[0]
    assert solver.table(schedule).lengths[method.rule.after(0)] == 7
    evenly = [0.84 * left / 7 for left in range(7, -1, -1)]  # released: 8 points of unshifted time, then shifted
    assert solver.visited(schedule, 4) == pytest.approx([3 * t / (1 + 2 * t) for t in evenly])


def test_mixgrpo_slides_one_step_every_25_iterations_and_begins_anew():
    _, method, _ = method_of(shifted(25), "mixgrpo")
    starts = [method.plan(7, iteration, 3).steps.tolist() for iteration in range(0, 25 * 43, 25)]
    last = 24 - 4  # a window of 4 that leaves the last step to the tail
    assert starts == [[[turn % (last + 1)] * 3] for turn in range(43)]
    assert method.plan(7, 24, 1).steps.tolist() == [[0]] and method.plan(7, 49, 1).steps.tolist() == [[1]]


def test_forks_are_drawn_for_each_prompt_or_for_all_of_them():
    """Flash-GRPO: evenly over the first half, anew for every prompt; Flow-GRPO-Fast: one start for all prompts."""
    _, flash, _ = method_of(shifted(10), "flash_grpo")
    drawn = torch.cat([flash.plan(0, iteration, 40).steps for iteration in range(15)])
    counts = torch.bincount(drawn.flatten(), minlength=10)
    assert not counts[5:].any() and counts[:5].min() > 90 and counts[:5].max() < 150
    assert all(len(set(row.tolist())) > 1 for row in drawn) and len({tuple(row.tolist()) for row in drawn}) == 15
    _, fast, _ = method_of(shifted(10), "flow_grpo_fast")
    starts = [set(fast.plan(0, iteration, 3).steps.flatten().tolist()) for iteration in range(60)]
    assert all(len(start) == 1 for start in starts) and set().union(*starts) == set(range(5))


def test_jumps_of_the_released_merging():
    """0 -> 1, 1 -> 2, 2 -> 4, 4 -> 7, each one Gaussian of its whole step, g that of where it begins."""
    sigmas = shifted(16)
    _, method, schedule = method_of(sigmas, "egrpo", "explore.forks=[0,1,2,4]", "explore.jump=[1,1,2,3]")
    assert [method.rule.after(fork) for fork in (0, 1, 2, 4)] == [1, 2, 4, 7]
    for fork, target in ((0, 1), (1, 2), (2, 4), (4, 7)):
        sigma = float(sigmas[fork])
        g = 0.7 * (sigma / (1 - float(sigmas[1] if fork == 0 else sigmas[fork]))) ** 0.5
        assert float(schedule.sde.std[fork]) == pytest.approx(g * float(sigmas[fork] - sigmas[target]) ** 0.5)
