"""Noise, step, ratio and loss against independent float64 computations."""

import math

import pytest
import torch
from tempflow_kernels import (
    branch_loss,
    fold_key,
    gaussian_terms,
    log_ratio,
    normal_like,
    philox4x32,
    transition_log_prob,
    transition_step,
)

ALL = 0xFFFFFFFF
RANDOM123 = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ALL, ALL, ALL, ALL), (ALL, ALL), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), RANDOM123)
def test_philox_gives_the_known_answers_of_random123(counter, key, words):
    found = philox4x32(tuple(torch.tensor(word) for word in counter), tuple(torch.tensor(word) for word in key))
    assert tuple(word.item() for word in found) == words


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(1)


def random_case(rows=3, siblings=4, shape=(2, 5, 3), dtype=torch.float64):
    """Fresh inputs: latents, velocities old and new, coefficients, keys."""
    latents, old = torch.randn(rows, *shape, dtype=dtype), torch.randn(rows, *shape, dtype=dtype)
    new = old + 0.1 * torch.randn(rows, *shape, dtype=dtype)
    coef = torch.stack((torch.rand(rows) + 0.5, -torch.rand(rows) - 0.1, torch.rand(rows) + 0.2), 1).to(dtype)
    keys = torch.randint(-(2**63), 2**63 - 1, (rows, 2))
    return latents, old, new, coef, keys, siblings


def test_noise_is_a_function_of_key_sibling_and_element_alone():
    _, old, _, _, keys, _ = random_case()
    noise = normal_like(old, keys, 6)
    assert torch.equal(normal_like(old, keys, 2), noise[:, :2])
    assert torch.equal(normal_like(old[1:], keys[1:], 6), noise[1:])
    assert noise.flatten(1).unique().numel() == noise.numel()


def test_next_step_of_the_same_stream_does_not_overlap():
    """The offset counts blocks of four: two draws whose offsets differ by the blocks of one draw share no number."""
    like = torch.empty(1, 10)
    first, second = (normal_like(like, torch.tensor([[7, offset]]), 1) for offset in (0, 3))
    assert not set(first.flatten().tolist()) & set(second.flatten().tolist())
    assert torch.equal(normal_like(like, torch.tensor([[7, 1]]), 1).flatten()[:6], first.flatten()[4:10])


def test_noise_is_standard_normal():
    noise = normal_like(torch.empty(4, 500_000), torch.tensor([[0, 0], [1, 0], [2**62, 5], [-1, -1]])).double()
    assert abs(noise.mean().item()) < 4 / math.sqrt(noise.numel())
    assert abs(noise.var().item() - 1) < 4 * math.sqrt(2 / noise.numel())
    assert abs((noise**4).mean().item() - 3) < 4 * math.sqrt(96 / noise.numel())
    assert torch.corrcoef(noise.view(4, -1)).fill_diagonal_(0).abs().max() < 4 / math.sqrt(500_000)


def test_folded_keys_differ_in_every_number():
    keys = fold_key(1, torch.arange(50).view(-1, 1, 1), torch.arange(20).view(-1, 1), torch.arange(10))
    assert keys.unique().numel() == 10_000
    assert fold_key(1, 2, 3) != fold_key(2, 2, 3)
    with pytest.raises(ValueError, match="at most 4"):
        fold_key(0, 1, 2, 3, 4, 5)


def gaussian(next_latents, mean, std):
    return torch.distributions.Normal(mean, std).log_prob(next_latents).flatten(2).mean(2)


def test_step_and_log_prob_are_the_affine_gaussian():
    latents, old, new, coef, keys, siblings = random_case()
    next_latents, log_prob = transition_step(latents, old, coef, keys, siblings)
    x_coef, v_coef, std = (column.view(-1, 1, 1, 1, 1) for column in coef.unbind(1))
    mean_old = x_coef * latents.unsqueeze(1) + v_coef * old.unsqueeze(1)
    mean_new = x_coef * latents.unsqueeze(1) + v_coef * new.unsqueeze(1)
    assert torch.allclose(next_latents, mean_old + std * normal_like(latents, keys, siblings), rtol=0, atol=1e-14)
    assert torch.allclose(log_prob, gaussian(next_latents, mean_old, std), rtol=0, atol=1e-13)
    found = transition_log_prob(next_latents, latents, new, coef)
    assert torch.allclose(found, gaussian(next_latents, mean_new, std), rtol=0, atol=1e-13)


def test_log_ratio_is_the_difference_of_log_probs():
    latents, old, new, coef, keys, siblings = random_case()
    next_latents, log_prob = transition_step(latents, old, coef, keys, siblings)
    difference = transition_log_prob(next_latents, latents, new, coef) - log_prob
    assert torch.allclose(log_ratio(new, old, coef, keys, siblings), difference, rtol=0, atol=1e-13)
    noise = normal_like(latents, keys, siblings)
    assert torch.equal(log_ratio(new, old, coef, noise=noise), log_ratio(new, old, coef, keys, siblings))
    assert torch.equal(log_ratio(old, old, coef, keys, siblings), torch.zeros(3, siblings, dtype=torch.float64))


def test_fp32_log_ratio_does_not_cancel():
    """FLUX 1024 px: 262,144 elements, a policy that moved by 1e-4 of the velocity."""
    _, old, _, coef, keys, _ = random_case(rows=2, shape=(4096, 64), dtype=torch.float32)
    new = old + 1e-4 * torch.randn_like(old)
    exact = log_ratio(new.double(), old.double(), coef.double(), keys, 3)
    assert (log_ratio(new, old, coef, keys, 3) - exact).abs().max() < 1e-8


def test_deterministic_rows_draw_nothing():
    latents, old, new, coef, keys, siblings = random_case()
    coef[1, 2] = 0
    next_latents, log_prob = transition_step(latents, old, coef, keys, siblings)
    mean = coef[1, 0] * latents[1] + coef[1, 1] * old[1]
    assert torch.equal(next_latents[1], mean.expand(siblings, *mean.shape))
    assert not log_prob[1].any() and log_prob[0].all()
    ratios = log_ratio(new, old, coef, keys, siblings)
    assert not ratios[1].any() and ratios[0].all()
    coef[:, 2] = 0
    assert torch.equal(transition_step(latents, old, coef, keys, siblings)[0][1], next_latents[1])


def copied_loss(latents, old, new, coef, keys, advantages, weights, clip, kl_coef, reference):
    """The computation of the released code in float64: every sibling a row of its own."""
    siblings = advantages.shape[1]
    next_latents, log_prob_old = transition_step(latents, old, coef, keys, siblings)
    rows = [tensor.repeat_interleave(siblings, 0) for tensor in (latents, new, coef, weights, reference)]
    x_copies, v_copies, coef_copies, weight_copies, reference_copies = rows
    log_prob = transition_log_prob(next_latents.flatten(0, 1).unsqueeze(1), x_copies, v_copies, coef_copies)[:, 0]
    ratio = torch.exp(log_prob - log_prob_old.flatten())
    gain = weight_copies * advantages.flatten()
    policy_loss = torch.maximum(-gain * ratio, -gain * ratio.clamp(1 - clip, 1 + clip)).mean()
    mean, mean_ref = (
        coef_copies[:, :1] * x_copies.flatten(1) + coef_copies[:, 1:2] * v.flatten(1)
        for v in (v_copies, reference_copies)
    )
    kl = ((mean - mean_ref) ** 2 / (2 * coef_copies[:, 2:] ** 2)).mean(1).mean()
    return policy_loss + kl_coef * kl


@pytest.mark.parametrize("clip", [1e-3, 10.0])
def test_siblings_sharing_a_forward_have_the_gradient_of_copies(clip):
    """Value and gradient of one shared row equal those of K copied rows, in float64, to 1e-12."""
    latents, old, new, coef, keys, siblings = random_case(rows=4, siblings=6)
    advantages, weights = torch.randn(4, siblings).double(), torch.rand(4).double()
    network = torch.nn.Linear(3, 3).double()
    reference = new + 0.2 * torch.randn_like(new)
    gradients = []
    for shared in (True, False):
        velocity = new + 0.1 * network(latents)
        if shared:
            loss, stats = branch_loss(velocity, old, advantages, gaussian_terms(coef, weights), key=keys,
                                      clip_range=(clip, clip), kl_coef=0.3, velocity_ref=reference)  # fmt: skip
        else:
            loss = copied_loss(latents, old, velocity, coef, keys, advantages, weights, clip, 0.3, reference)
        gradients.append((loss.detach(), *torch.autograd.grad(loss, network.parameters())))
    for shared, copied in zip(*gradients, strict=True):
        assert torch.allclose(shared, copied, rtol=0, atol=1e-12)
    assert (stats.clip_fraction > 0) == (clip == 1e-3)


def test_weight_zero_removes_the_gradient_but_counts_in_the_mean():
    _, old, new, coef, keys, siblings = random_case(rows=2)
    advantages = torch.randn(2, siblings).double()

    def gradient(weights):
        velocity = new.clone().requires_grad_()
        branch_loss(velocity, old, advantages, gaussian_terms(coef, weights), key=keys, clip_range=(9, 9))[0].backward()
        return velocity.grad

    both, one = gradient(torch.ones(2).double()), gradient(torch.tensor([1.0, 0.0]).double())
    assert torch.equal(one[0], both[0]) and not one[1].any()


def test_gradients_reach_both_halves_of_a_guided_velocity():
    """Guidance is outside of the loss: the gradient of the mixed velocity times guidance and 1 - guidance."""
    _, old, cond, coef, keys, siblings = random_case()
    uncond, advantages = torch.randn_like(cond), torch.randn(3, siblings).double()
    mixed = (uncond + 4.5 * (cond - uncond)).requires_grad_()
    cond.requires_grad_(), uncond.requires_grad_()
    arguments = (old, advantages, gaussian_terms(coef), keys, None, (9, 9))
    (whole,) = torch.autograd.grad(branch_loss(mixed, *arguments)[0], mixed)
    halves = torch.autograd.grad(branch_loss(uncond + 4.5 * (cond - uncond), *arguments)[0], (cond, uncond))
    for half, share in zip(halves, (4.5, -3.5), strict=True):
        assert torch.allclose(half, share * whole, rtol=0, atol=1e-14)


def test_kl_weights_scale_rows():
    _, old, new, coef, keys, siblings = random_case()
    nothing = torch.zeros(3, siblings).double()

    def kl(kl_weights):
        terms = gaussian_terms(coef, kl_weights=kl_weights)
        loss, _ = branch_loss(new, new, nothing, terms, key=keys, kl_coef=1.0, velocity_ref=old)
        return loss

    weights = torch.tensor([0.0, 0.5, 0.0]).double()
    row = 0.5 * (coef[1, 1] / coef[1, 2]) ** 2 * (new[1] - old[1]).square().mean()
    assert kl(weights).item() == pytest.approx((0.5 * row / 3).item(), rel=1e-12)
    assert kl(None).item() == pytest.approx(kl(torch.ones(3).double()).item())
