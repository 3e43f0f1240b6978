"""What every backend must fulfil: its error against the float64 oracle is at most twice that of plain torch of the
same dtypes, plus a few ulp. Run by the tests of the C++ twin, of Triton in the interpreter, and of Triton on a GPU.
"""

import tempflow_kernels as tk
import torch
from kernel_cases import (
    Case,
    oracle_log_prob,
    oracle_log_ratio,
    oracle_loss,
    oracle_noise,
    oracle_step,
)
from tempflow_kernels.plain import ops as reference_ops
from tempflow_kernels.plain import reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CASES = [
    Case(),
    Case(stored_noise=True),
    Case(shape=(2049,), siblings=1, optional=()),
    Case(shape=(1,), siblings=2),
    Case(shape=(16, 16, 8), siblings=6, optional=("velocity_uncond",)),
    Case(shape=(2, 9, 5), method="guard", clip_range=(1e-5, 2e-5)),
    Case(shape=(1025,), method="cps", stored_noise=True),
    Case(shape=(3, 31), siblings=5, rows=7, method="free", seed=21, optional=("velocity_ref",)),
    Case(shape=(5, 13), dtype=torch.bfloat16),
    Case(shape=(33, 32), dtype=torch.bfloat16, stored_noise=True),
    Case(shape=(6, 17), dtype=torch.bfloat16, method="cps", optional=()),
    Case(shape=(64,), dtype=torch.float16, optional=("velocity_ref",)),
    Case(shape=(1023,), rows=5, dtype=torch.float16, stored_noise=True),
    Case(shape=(40,), distance=3.0, clip_range=(0.2, 0.3)),
]
ULP = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10, torch.float64: 2.0**-52}


def assert_close_as_torch(name, found, plain, oracle, ulps=4):
    """|found - oracle| <= 2 max |plain - oracle| + ulps of the largest value."""
    assert found.shape == oracle.shape and found.dtype == plain.dtype, name
    scale = max(float(oracle.abs().max()), 2.0**-14 if found.dtype == torch.float16 else 0.0)
    allowed = 2 * float((plain.double() - oracle).abs().max()) + ulps * ULP[found.dtype] * scale
    error = float((found.double() - oracle).abs().max())
    assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


def check_noise(module, case):
    found = module.normal(case.key, case.siblings, case.elements)
    oracle = oracle_noise(case).flatten(2)
    assert_close_as_torch("normal", found, reference_ops.normal(case.key, case.siblings, case.elements), oracle)


def check_step(module, case):
    noise = oracle_noise(case)
    arguments = (
        case.latents, case.velocity, case.coef, case.key, case.siblings, case.velocity_uncond, case.guidance
    )  # fmt: skip
    found, plain = (source.transition_step(*arguments) for source in (module, reference))
    oracle = oracle_step(case, noise)
    for name, *values in zip(("next_latents", "log_prob"), found, plain, oracle, strict=True):
        assert_close_as_torch(name, *values)
    assert torch.equal(found[1][1], torch.zeros_like(found[1][1])), "an ODE row has log_prob 0"
    assert torch.equal(found[0][1], found[0][1][:1].expand_as(found[0][1])), "siblings of an ODE row are equal"


def check_log_prob(module, case):
    following = oracle_step(case, oracle_noise(case))[0].float()
    velocity = case.velocity.double().clone().requires_grad_()
    columns = [c.view(-1, 1, *[1] * len(case.shape)) for c in case.coef.double().unbind(1)]
    mean = columns[0] * case.latents.double()[:, None] + columns[1] * velocity[:, None]
    oracle = oracle_log_prob(following.double(), mean, columns[2])
    slopes = case.advantages
    (oracle * slopes.double()).sum().backward()
    arguments = (following, case.latents, case.velocity, case.coef)
    leaf = case.velocity.clone().requires_grad_()
    plain = reference.transition_log_prob(following, case.latents, leaf, case.coef)
    (plain * slopes).sum().backward()
    assert_close_as_torch("log_prob", module.transition_log_prob(*arguments), plain.detach(), oracle.detach())
    gradient = module.transition_log_prob_gradient(slopes, *arguments)
    assert_close_as_torch("log_prob gradient", gradient, leaf.grad, velocity.grad)


def check_log_ratio(module, case):
    velocity = case.velocity.double().clone().requires_grad_()
    oracle = oracle_log_ratio(case, oracle_noise(case), velocity.unsqueeze(1))
    slopes = case.advantages
    (oracle * slopes.double()).sum().backward()
    branches, leaf = case.ratio_branches, case.velocity.clone().requires_grad_()
    plain = reference.log_ratio(branches._replace(velocity=leaf), case.siblings)
    (plain * slopes).sum().backward()
    found = module.log_ratio(branches, case.siblings)
    assert_close_as_torch("log_ratio", found, plain.detach(), oracle.detach())
    gradient = module.velocity_gradient(branches, slopes, torch.ones((), device=case.device))
    assert_close_as_torch("log_ratio gradient", gradient, leaf.grad, velocity.grad)


def check_loss(module, case, scale=1.0):
    loss, stats, gradient = oracle_loss(case, oracle_noise(case))
    plain_loss, plain_stats, plain_gradient = plain_branch_loss(case, scale)
    found_loss, found_stats, slopes = module.branch_loss(*case.loss_arguments)
    assert_close_as_torch("loss", found_loss, plain_loss, loss)
    for name, *values in zip(reference.BranchLossStats._fields, found_stats, plain_stats, stats, strict=True):
        assert_close_as_torch(name, *values)
    found = module.velocity_gradient(case.branches, slopes, torch.tensor(scale, device=case.device))
    assert_close_as_torch("gradient", found, plain_gradient, scale * gradient)
    check_loss_gradient(module, case, (found_loss, found_stats), gradient)


def check_loss_gradient(module, case, expected, oracle):
    """The one call for loss and gradient: the same loss, and the gradient in fp32."""
    *found, at_once = module.branch_loss_gradient(*case.loss_arguments)
    for value, other in zip(found, expected, strict=True):
        torch.testing.assert_close(value, other, rtol=1e-6, atol=1e-6 * float(other.abs().max()))
    error, scale = float((at_once.double() - oracle).abs().max()), float(oracle.abs().max())
    assert at_once.dtype == torch.float32
    assert error <= 1e-5 * scale, f"gradient at once: error {error:.3g} of {scale:.3g}"


def check_fast_noise(module, case):
    """Fast normals are within 1e-5 of the exact ones, and step, log-ratio, loss and gradient all draw the same."""
    normals = {}
    for mode in ("exact", "fast"):
        tk.use_noise(mode)
        normals[mode] = module.normal(case.key, case.siblings, case.elements)
    assert 0 < (normals["fast"] - normals["exact"]).abs().max() < 1e-5
    std, v_coef, x_coef = (case.coef[:, i].view(-1, 1, 1) for i in (2, 1, 0))
    mean = x_coef * case.latents.float().flatten(1)[:, None] + v_coef * case.velocity.float().flatten(1)[:, None]
    step = module.transition_step(case.latents, case.velocity, case.coef, case.key, case.siblings, None, 1.0)[0]
    torch.testing.assert_close(step.flatten(2), mean + std * normals["fast"], rtol=1e-6, atol=1e-6)
    stored = case.branches._replace(key=None, noise=normals["fast"].view(-1, case.siblings, *case.shape))
    drawn, kept = (module.branch_loss(b, *case.loss_arguments[1:]) for b in (case.branches, stored))
    for found, expected in zip(drawn, kept, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
    one = torch.ones((), device=case.device)
    found, expected = (module.velocity_gradient(b, case.advantages, one) for b in (case.branches, stored))
    torch.testing.assert_close(found, expected, rtol=2e-6, atol=1e-7)


def check_nan(module, case):
    """A NaN anywhere in the velocity must show in the loss: nothing may clip it away."""
    case.tensors["velocity"] = case.velocity.clone()
    case.tensors["velocity"][2].view(-1)[-1] = float("nan")
    loss, stats, _ = module.branch_loss(*case.loss_arguments)
    assert torch.isnan(loss) and torch.isnan(stats[1])


def plain_branch_loss(case, scale):
    """loss, stats and gradient of the plain-torch definition in the dtypes of the case."""
    leaf = case.velocity.clone().requires_grad_()
    branches, *others = case.loss_arguments
    loss, stats = reference.branch_loss(branches._replace(velocity=leaf), *others)
    (scale * loss).backward()
    return loss.detach(), stats.table, leaf.grad


def _settings(case):
    return {name: value for name, value in vars(case).items() if name != "tensors"}


def on_device(case, device):
    """The same case on another device."""
    return Case(**{**_settings(case), "device": device})


def unnumbered(case):
    """The same case with noise drawn from keys."""
    return Case(**{**_settings(case), "stored_noise": False})
