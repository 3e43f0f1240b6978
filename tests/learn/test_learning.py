"""The training step's own backward: gradients against the released computation, first ratio exactly 1, figures."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from rollout_cases import explored, forked
from tempflow_kernels import BranchLossStats, normal_like

from tempflow.credit.advantage import Credit
from tempflow.learn.batches import updates
from tempflow.learn.noise import LossNoise
from tempflow.learn.objective import make_objective
from tempflow.learn.statistics import LossRecord, loss_figures
from tempflow.settings.fields import LearnConfig, ObjectiveConfig
from tempflow.train import backward

TEXTS = ("a two at the top left", "three fours", "a one above a nine")


class Case:
    """6 trunks of 4 siblings, explored; half of the groups tell nothing."""

    stored = False
    """the noise of the loss"""

    def __init__(self, policy, objective=None, idle="keep", texts=TEXTS, **explore):
        torch.manual_seed(2)
        self.policy, self.idle, self.config = policy, idle, ObjectiveConfig(**objective or {})
        self.schedule, self.plan, rule = forked(**{"forks": [0, 4, 8], "siblings": 4} | explore)
        self.trained = rule.trained()
        self.rollout = explored(policy, self.schedule, self.plan, 3, texts)
        self.advantages = torch.randn(self.plan.forks, 6, self.plan.siblings)
        self.informative = torch.arange(6 * self.plan.forks).view(-1, 6) % 2 == 0
        self.advantages *= self.informative[:, :, None]

    def learn(self, rows=3):
        """The figures of one optimizer step; its gradient is left on the parameters."""
        objective = make_objective(self.config, self.schedule, self.trained, self.idle)
        trainer = SimpleNamespace(policy=self.policy, schedule=self.schedule,
                                  method=SimpleNamespace(objective=objective),
                                  noise=LossNoise(self.stored),
                                  stepper=SimpleNamespace(backward=lambda loss: loss.backward()))  # fmt: skip
        credit = Credit(self.advantages, self.informative, 18, 9)
        (update,) = updates(self.rollout, credit, objective, LearnConfig(rows=rows), range(6))
        record = LossRecord()
        for batch in update.batches:
            record.add(backward(trainer, batch), 0)
        return loss_figures(record.totals())

    def released_loss(self):
        """Every decision of every branch by itself in float64, as the papers write it."""
        losses, counted = [], 0
        for decision in self.rollout.decisions:
            per_trunk = len(decision.steps) // 6
            noise = normal_like(decision.latents.double(), decision.keys, decision.siblings)
            for row in range(len(decision.steps)):
                known = bool(self.informative[decision.fork, row // per_trunk])
                own = self.advantages[decision.fork, row // per_trunk]
                for sibling in range(decision.siblings):
                    advantage = own[sibling if per_trunk == 1 else row % per_trunk].double()
                    losses.append(self._one(decision, row, noise[row, sibling], advantage, known))
                    counted += known or self.idle == "keep"
        return sum(losses) / counted

    def _one(self, decision, row, noise, advantage, known):
        sde, step = self.schedule.sde, int(decision.steps[row])
        x, old, std = decision.latents[row].double(), decision.velocity[row].double(), sde.std[step]
        arguments = (decision.latents[row : row + 1].double(), self.schedule.sigmas[step].view(1),
                     decision.conditioning(slice(row, row + 1)))  # fmt: skip
        mean = sde.x_coef[step] * x + sde.v_coef[step] * self.policy.velocity(*arguments)[0]
        mean_old = sde.x_coef[step] * x + sde.v_coef[step] * old
        with torch.no_grad(), self.policy.reference():
            mean_ref = sde.x_coef[step] * x + sde.v_coef[step] * self.policy.velocity(*arguments)[0]
        ratio = self._log_ratio(mean_old + std * noise, mean, mean_old, std).exp()
        gain = self._weight(step) * advantage * known
        clipped = ratio.clamp(1 - self.config.clip, 1 + self.config.clip)
        divisor = 2 * std**2 / (self.schedule.step_sizes()[step] if self.config.kl_divisor == "diffusion" else 1)
        kl = ((mean - mean_ref) ** 2 / divisor).mean()
        return torch.maximum(-gain * ratio, -gain * clipped) + self.config.kl * kl * (known or self.idle == "keep")

    def _log_ratio(self, reached, mean, mean_old, std):
        change = (reached - mean_old) ** 2 - (reached - mean) ** 2
        return {"gaussian": change / (2 * std**2), "undivided": change,
                "guard": (change + (mean - mean_old) ** 2) / (2 * std)}[self.config.ratio].mean()  # fmt: skip

    def _weight(self, step):
        if self.config.weighting == "uniform":
            return 1.0
        return self.schedule.sde.std[step] / self.schedule.sde.std[self.trained].mean()


@torch.no_grad()
def move(toy, size=0.02):
    """A policy that has learnt something since it sampled, and a reference that is neither."""
    first = toy.scale.detach() - 0.1, toy.bias.detach() * 1.5

    @contextmanager
    def reference():
        toy.own = first
        yield
        toy.own = (toy.scale, toy.bias)

    toy.reference = reference
    toy.scale.add_(torch.tensor([size, -size, size]))
    toy.bias.mul_(1 - size)


METHODS = {
    "tempflow": ({}, {}),
    "uniform weights": ({"weighting": "uniform"}, {}),
    "a wide clip": ({"clip": 10.0}, {}),
    "kl over 2 std^2": ({"kl": 0.7, "clip": 10.0}, {}),
    "kl over 2 g^2": ({"kl": 0.7, "kl_divisor": "diffusion", "clip": 10.0}, {}),
    "guard": ({"ratio": "guard", "clip": 1e-3, "kl": 0.3}, {}),
    "undivided": ({"ratio": "undivided", "clip": 1e-3, "kl": 0.3}, {}),
    "windows": ({"kl": 0.3, "clip": 1e-2}, {"forks": [0, 3, 6], "window": 3}),
    "chains": ({"kl": 0.3, "clip": 1e-2}, {"forks": [0], "window": "rest", "siblings": 1}),
    "forks of each prompt": ({"kl": 0.3, "clip": 1e-3}, {"forks": [0, 2, 5], "take": 2, "draw": "prompt"}),
    "drawn forks": ({}, {"forks": "random:3"}),
    "merged steps": ({"kl": 0.3, "kl_divisor": "diffusion"}, {"forks": [0, 3, 5], "jump": [1, 2, 3]}),
}


@pytest.mark.parametrize("idle", ["keep", "drop"])
@pytest.mark.parametrize("name", METHODS)
def test_gradients_are_those_of_the_released_computation(toy, name, idle):
    """Of a policy that has moved: weights, both clips, ratios, KL and its divisor, masks, windows, shares."""
    objective, explore = METHODS[name]
    case = Case(toy, {"clip": 5e-3} | objective, idle, **explore)
    move(toy)
    figures = case.learn()
    found = torch.cat([parameter.grad.flatten() for parameter in (toy.scale, toy.bias)])
    gradients = torch.autograd.grad(case.released_loss(), (toy.scale, toy.bias))
    expected = torch.cat([gradient.flatten() for gradient in gradients])
    assert (found - expected).norm() < 1e-4 * expected.norm() and expected.norm() > 1e-6
    assert (figures["clip_fraction"] > 0) == (case.config.clip < 1)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_ratios_are_clipped_on_both_sides(toy, sign):
    """Where all advantages have one sign, gradients of ratios that went too far that way are gone: the others stay."""
    case = Case(toy, {"clip": 1e-7, "weighting": "uniform"})
    case.advantages, case.informative[:] = torch.full_like(case.advantages, sign), True
    move(toy)
    figures = case.learn()
    assert figures["clip_fraction"] > 0.9
    gradients = torch.autograd.grad(case.released_loss(), (toy.scale, toy.bias))
    for parameter, gradient in zip((toy.scale, toy.bias), gradients, strict=True):
        assert torch.allclose(parameter.grad, gradient, rtol=1e-3)


def test_several_processes_average_to_one(toy):
    """Dropped groups: the mean over the informative ones of all processes, however few one of them has."""
    case = Case(toy, {"kl": 0.4, "clip": 10.0}, "drop")
    case.informative[:] = False
    case.informative[:, 0] = True
    case.informative[1, 4] = True
    move(toy)
    objective = make_objective(case.config, case.schedule, case.trained, "drop")
    shares = []
    for own in (range(3), range(3, 6)):  # each has half of the trunks; here both hold all of the rollout
        part = type(case.rollout)(tuple(_half(d, own) for d in case.rollout.decisions), case.rollout.branches[:, own],
                                  case.rollout.first_steps[:, own], case.rollout.conditioning)  # fmt: skip
        credit = Credit(case.advantages, case.informative, 18, 14)
        (update,) = updates(part, credit, objective, LearnConfig(rows=3), own)
        trainer = SimpleNamespace(policy=toy, schedule=case.schedule, method=SimpleNamespace(objective=objective),
                                  noise=LossNoise(False),
                                  stepper=SimpleNamespace(backward=lambda loss: (loss / 2).backward()))  # fmt: skip
        for batch in update.batches:
            backward(trainer, batch)
        shares.append(len(update.batches))
    assert shares == [3, 1]
    gradients = torch.autograd.grad(case.released_loss(), (toy.scale, toy.bias))
    for parameter, gradient in zip((toy.scale, toy.bias), gradients, strict=True):
        assert torch.allclose(parameter.grad, gradient, rtol=1e-4)


def _half(decision, own):
    here = slice(own.start, own.stop)
    return type(decision)(decision.fork, decision.steps[here], decision.latents[here], decision.velocity[here],
                          decision.keys[here], decision.siblings, decision.conditioning(here))  # fmt: skip


@pytest.mark.parametrize("window", [1, 2])
def test_first_ratio_is_exactly_one_on_the_sd3_pipeline(digits_policy, window):
    """Learning repeats the sampling policy's own network calls, so nothing has drifted: not 1e-7, 0."""
    case = Case(digits_policy, {"clip": 1e-4}, forks=[0, 4, 7], window=window)
    summary = case.learn()
    assert summary["first_log_ratio_max"] == 0.0 and summary["log_ratio_max"] == 0.0
    assert summary["ratio_mean"] == 1.0 and summary["clip_fraction"] == 0.0
    assert any(parameter.grad.abs().sum() > 0 for parameter in digits_policy.trainable().values())


def test_a_moved_policy_has_another_ratio(digits_policy, disturb):
    case = Case(digits_policy, {"clip": 1e-4})
    disturb(digits_policy.trainable(), 0.01)
    summary = case.learn()
    assert summary["log_ratio_max"] > 1e-5 and summary["clip_fraction"] > 0


def test_figures_of_several_ranks_are_those_of_one():
    """Means are weighted by batches, maxima are maxima, and the first update is told from the rest."""

    def stats(value):
        return BranchLossStats(torch.full((len(BranchLossStats._fields),), value))

    whole, ranks = LossRecord(), [LossRecord(), LossRecord(), LossRecord()]
    for rank, update, value in ((0, 0, 1.0), (0, 1, 5.0), (1, 0, 0.0), (1, 0, 2.0), (1, 1, 4.0)):
        whole.add(stats(value), update)
        ranks[rank].add(stats(value), update)
    figures = loss_figures(torch.cat([record.totals() for record in ranks]))
    assert figures == pytest.approx(loss_figures(whole.totals()))
    assert (figures["kl"], figures["log_ratio_max"]) == (pytest.approx(2.4), 5.0)
    assert (figures["first_log_ratio_mean"], figures["first_log_ratio_max"]) == (1.0, 2.0)
    assert loss_figures(LossRecord().totals()) == {}


def test_reference_is_the_model_before_training(digits_policy, schedule):
    latents, sigma = torch.randn(2, 4, 8, 8), torch.tensor([0.9, 0.3])
    conditioning = digits_policy.encode(TEXTS[:2])
    with torch.no_grad():
        trained = digits_policy.velocity(latents, sigma, conditioning)
        with digits_policy.reference():
            before = digits_policy.velocity(latents, sigma, conditioning)
        for name, parameter in digits_policy.trainable().items():
            if ".lora_B." in name:
                parameter.zero_()
        assert torch.equal(digits_policy.velocity(latents, sigma, conditioning), before)
    assert (trained - before).abs().max() > 1e-3


def test_gradients_reach_exactly_the_adapters(digits_policy):
    parameters = dict(digits_policy.network.module.named_parameters())
    trained = {name for name, parameter in parameters.items() if parameter.requires_grad}
    assert trained == set(digits_policy.trainable()) and all(".lora_" in name for name in trained)
    velocity = digits_policy.velocity(torch.randn(2, 4, 8, 8), torch.full((2,), 0.5), digits_policy.encode(TEXTS[:2]))
    velocity.square().sum().backward()
    assert {name for name, parameter in parameters.items() if parameter.grad is not None} == trained


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_counted_and_left_out_of_the_means(bad):
    values = torch.full((len(BranchLossStats._fields),), 2.0)
    spoilt = values.clone()
    spoilt[BranchLossStats._fields.index("ratio_max")] = bad
    ranks = [LossRecord(), LossRecord()]
    ranks[0].add(BranchLossStats(values), 0)
    ranks[1].add(BranchLossStats(spoilt), 0)
    figures = loss_figures(torch.cat([record.totals() for record in ranks]))
    assert figures["nonfinite_losses"] == 1
    assert {value for name, value in figures.items() if name != "nonfinite_losses"} == {2.0}
    assert loss_figures(ranks[1].totals()) == {"nonfinite_losses": 1}
