"""The public operators on CPU: checks, autograd, layouts, opcheck, torch.compile, and which backend serves."""

import os
import subprocess
import sys

import pytest
import tempflow_kernels as tk
import torch
from kernel_cases import Case
from tempflow_kernels._ops import ops
from tempflow_kernels.library import SCHEMAS
from tempflow_kernels.plain.reference import Branches

CASE = Case()


def loss_call(case=CASE, **changes):
    names = ("velocity", "velocity_old", "advantages", "terms", "key", "noise", "velocity_ref", "kl_coef", "clip_range")
    return tk.branch_loss(**({name: getattr(case, name) for name in names} | changes))


def step_call(**changes):
    names = ("latents", "velocity", "coef", "key")
    return tk.transition_step(**({name: getattr(CASE, name) for name in names} | changes))


def ratio_call(**changes):
    names = ("velocity", "velocity_old", "coef", "key")
    return tk.log_ratio(**({name: getattr(CASE, name) for name in names} | {"siblings": 3} | changes))


def log_prob_call(**changes):
    following = torch.zeros(4, 3, 3, 7, 11)
    arguments = {"next_latents": following, "latents": CASE.latents, "velocity": CASE.velocity, "coef": CASE.coef}
    return tk.transition_log_prob(**(arguments | changes))


def terms_call(**changes):
    return tk.gaussian_terms(**({"coef": CASE.coef} | changes))


NEGATIVE = CASE.coef * torch.tensor([1.0, 1.0, -1.0])
LATE_NEGATIVE = CASE.coef.clone()
LATE_NEGATIVE[3, 2] = -0.2
NOISE = torch.zeros(4, 3, 3, 7, 11)
META = torch.zeros(4, 3, 7, 11, device="meta")
ON_META = "found device meta, expected device cpu, that of the first argument"
WRONG_USE = [
    (step_call, {"coef": CASE.coef[:, :2]}, "coef: found shape (4, 2), expected shape (4, 3)"),
    (step_call, {"coef": CASE.coef.half()}, "coef: found torch.float16, expected torch.float32 or torch.float64"),
    (step_call, {"coef": NEGATIVE}, "coef: found std -0."),
    (step_call, {"key": CASE.key.int()}, "key: found torch.int32, expected torch.int64"),
    (step_call, {"key": CASE.key.float()}, "key: found torch.float32, expected torch.int64"),
    (step_call, {"key": 7}, "key: found int, expected a tensor of shape (4, 2)"),
    (step_call, {"key": CASE.key[:3]}, "key: found shape (3, 2), expected shape (4, 2)"),
    (step_call, {"velocity": CASE.velocity[:, :2]}, "velocity: found shape (4, 2, 7, 11), expected shape (4, 3,"),
    (step_call, {"velocity": META}, "velocity: found device meta, expected device cpu"),
    (step_call, {"velocity_uncond": CASE.velocity[:1]}, "velocity_uncond: found shape (1, 3, 7, 11)"),
    (step_call, {"siblings": 0}, "siblings: found 0, expected a positive int"),
    (step_call, {"siblings": 1.5}, "siblings: found 1.5, expected a positive int"),
    (step_call, {"guidance": torch.tensor(2.0)}, "guidance: found Tensor, expected a Python number"),
    (step_call, {"latents": torch.zeros(4)}, "latents: found shape (4,), expected shape (R, D...)"),
    (step_call, {"latents": torch.zeros(0, 3)}, "latents: found shape (0, 3), expected at least one row"),
    (step_call, {"latents": CASE.latents.long()}, "latents: found torch.int64, expected torch.float32"),
    (step_call, {"coef": CASE.coef.to("meta")}, f"coef: {ON_META}"),
    (step_call, {"key": CASE.key.to("meta")}, f"key: {ON_META}"),
    (step_call, {"coef": CASE.coef[0]}, "coef: found shape (3,), expected shape (4, 3)"),
    (step_call, {"coef": [0.9, -0.1, 0.3]}, "coef: found list, expected a tensor of shape (4, 3)"),
    (step_call, {"guidance": 2.0}, "velocity_uncond: found None, expected a velocity where guidance is not 1"),
    (log_prob_call, {"next_latents": NOISE.to("meta")}, f"next_latents: {ON_META}"),
    (log_prob_call, {"next_latents": NOISE[:3]}, "next_latents: found shape (3, 3, 3, 7, 11), expected shape (4, 3,"),
    (log_prob_call, {"next_latents": NOISE[:, :, 0]}, "next_latents: found shape (4, 3, 7, 11)"),
    (log_prob_call, {"coef": NEGATIVE}, "coef: found std -0."),
    (ratio_call, {"noise": NOISE}, "key, noise: found both, expected exactly one"),
    (ratio_call, {"key": None}, "key, noise: found neither, expected exactly one"),
    (ratio_call, {"siblings": None}, "siblings: found None, expected a positive int"),
    (ratio_call, {"coef": NEGATIVE}, "coef: found std -0."),
    (ratio_call, {"velocity_old": META}, f"velocity_old: {ON_META}"),
    (ratio_call, {"key": None, "noise": NOISE[:, :2]}, "noise: found shape (4, 2, 3, 7, 11), expected shape (4, 3, 3,"),
    (loss_call, {"terms": CASE.coef}, "terms: found shape (4, 3), expected shape (4, 4)"),
    (loss_call, {"terms": CASE.terms.half()}, "terms: found torch.float16, expected torch.float32 or torch.float64"),
    (loss_call, {"terms": CASE.terms[:3]}, "terms: found shape (3, 4), expected shape (4, 4)"),
    (loss_call, {"terms": CASE.terms.to("meta")}, f"terms: {ON_META}"),
    (loss_call, {"terms": [1.0] * 4}, "terms: found list, expected a tensor of shape (4, 4)"),
    (loss_call, {"key": CASE.key.int()}, "key: found torch.int32, expected torch.int64"),
    (loss_call, {"velocity_old": META}, f"velocity_old: {ON_META}"),
    (loss_call, {"advantages": CASE.advantages.to("meta")}, f"advantages: {ON_META}"),
    (loss_call, {"velocity_ref": None}, "velocity_ref: found None, expected a reference velocity where kl_coef > 0"),
    (loss_call, {"noise": NOISE}, "key, noise: found both, expected exactly one"),
    (loss_call, {"key": None}, "key, noise: found neither, expected exactly one"),
    (loss_call, {"key": None, "noise": NOISE[:, :2]}, "noise: found shape (4, 2, 3, 7, 11), expected shape (4, 3, 3,"),
    (loss_call, {"advantages": CASE.advantages[:3]}, "advantages: found shape (3, 3), expected shape (4, 3)"),
    (loss_call, {"advantages": CASE.advantages[:, 0]}, "advantages: found shape (4,), expected shape (4, 1)"),
    (loss_call, {"clip_range": 1e-4}, "clip_range: found 0.0001, expected a pair (low, high)"),
    (loss_call, {"clip_range": (-1e-4, 1e-4)}, "clip_range: found -0.0001, expected a number >= 0"),
    (loss_call, {"kl_coef": -1.0}, "kl_coef: found -1.0, expected a number >= 0"),
    (terms_call, {"coef": NEGATIVE}, "coef: found std -0."),
    (terms_call, {"coef": LATE_NEGATIVE}, "coef: found std -0.2"),
    (terms_call, {"coef": CASE.terms}, "coef: found shape (4, 4), expected shape (4, 3)"),
    (terms_call, {"coef": [0.9, -0.1, 0.3]}, "coef: found list, expected a tensor"),
    (terms_call, {"weights": CASE.advantages}, "weights: found shape (4, 3), expected shape (4,)"),
    (terms_call, {"weights": [1.0] * 4}, "weights: found list, expected a tensor of shape (4,)"),
    (terms_call, {"kl_weights": CASE.advantages}, "kl_weights: found shape (4, 3), expected shape (4,)"),
    (step_call, {"coef": LATE_NEGATIVE}, "coef: found std -0.2"),
    (loss_call, {"velocity_ref": CASE.velocity[None]}, "velocity_ref: found shape (1, 4, 3, 7, 11)"),
    (lambda **kw: tk.normal_like(CASE.latents, CASE.key, **kw), {"siblings": True}, "siblings: found True, expected"),
    (lambda **kw: tk.normal_like(CASE.latents, **kw), {"key": CASE.key[:, :1]}, "key: found shape (4, 1), expected"),
]


@pytest.mark.parametrize(("call", "changes", "message"), WRONG_USE, ids=[row[2][:40] for row in WRONG_USE])
def test_wrong_use_names_argument_found_and_expected(call, changes, message):
    with pytest.raises(ValueError) as error:
        call(**changes)
    assert message in str(error.value)


def test_float64_noise_is_the_noise_of_the_float64_step():
    case = Case(dtype=torch.float64)
    ode, _ = tk.transition_step(case.latents, case.velocity, case.coef * torch.tensor([1, 1, 0.0]), case.key, 2)
    drawn, _ = tk.transition_step(case.latents, case.velocity, case.coef, case.key, 2)
    std = case.coef[:, 2].double().view(-1, 1, 1, 1, 1)
    assert (drawn - ode - std * tk.normal_like(case.latents, case.key, 2)).abs().max() < 1e-14


def test_gradients_in_arguments_the_fused_operators_treat_as_constants():
    latents = CASE.latents.clone().requires_grad_()
    following, log_prob = step_call(latents=latents)
    (following.sum() + log_prob.sum()).backward()
    x_coef = CASE.coef[:, :1, None, None].expand_as(latents)
    torch.testing.assert_close(latents.grad, x_coef)
    old = CASE.velocity_old.clone().requires_grad_()
    ratio_call(velocity_old=old).sum().backward()
    assert old.grad.abs().max() > 0


def test_no_gradient_is_computed_where_none_is_wanted():
    assert not loss_call()[0].requires_grad
    velocity = CASE.velocity.clone().requires_grad_()
    with torch.no_grad():
        assert not loss_call(velocity=velocity)[0].requires_grad
    loss, stats = loss_call(velocity=velocity)
    assert loss.requires_grad and not any(stat.requires_grad for stat in stats)


def test_layout_does_not_matter():
    seeded = torch.Generator().manual_seed(0)
    wide = torch.randn(4, 11, 3, 14, generator=seeded)
    strided = wide.permute(0, 2, 3, 1)[:, :, ::2]
    assert not strided.is_contiguous() and strided.shape == CASE.velocity.shape
    expanded = torch.randn(1, 3, 7, 11, generator=seeded).expand(4, -1, -1, -1)
    for a, b in ((strided, expanded), (expanded, strided)):
        found, expected = step_call(latents=a, velocity=b), step_call(latents=a.contiguous(), velocity=b.contiguous())
        assert all(map(torch.equal, found, expected))
        found = loss_call(velocity=a, velocity_old=b, velocity_ref=a)
        dense = [tensor.contiguous() for tensor in (a, b)]
        expected = loss_call(velocity=dense[0], velocity_old=dense[1], velocity_ref=dense[0])
        assert torch.equal(found[0], expected[0])
    leaf = strided.detach().requires_grad_()
    loss_call(velocity=leaf)[0].backward()
    assert leaf.grad.shape == leaf.shape


def op_arguments(case):
    seeded = torch.Generator().manual_seed(1)
    slopes = torch.randn(case.rows, case.siblings, generator=seeded)
    following = torch.randn(case.rows, case.siblings, *case.shape, generator=seeded)
    step, loss = (case.latents, case.velocity, case.coef), (*case.branches, case.advantages, *case.clip_range)
    return {
        "normal": (case.tensors["key"], 3, 10),
        "transition_step": (*step, case.tensors["key"], 2, case.velocity_uncond, 1.5),
        "transition_log_prob": (following, *step),
        "transition_log_prob_gradient": (slopes, following, *step),
        "log_ratio": (*case.branches, case.siblings),
        "branch_loss": loss,
        "branch_loss_gradient": loss,
        "velocity_gradient": (*case.branches, slopes, torch.ones(())),
    }


def test_the_schema_has_the_fields_of_the_branches():
    names = [argument.name for argument in ops.branch_loss.default._schema.arguments]
    assert names == [*Branches._fields, "advantages", "clip_low", "clip_high"]


@pytest.mark.parametrize("name", SCHEMAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["dense", "permuted"])
def test_opcheck(name, dtype, layout):
    case = Case(shape=(2, 3, 5), dtype=dtype, stored_noise=layout == "permuted")
    if layout == "permuted":
        for key in ("latents", "velocity", "velocity_old", "velocity_uncond"):
            case.tensors[key] = case.tensors[key].to(memory_format=torch.channels_last)
    torch.library.opcheck(getattr(ops, name).default, op_arguments(case)[name])


def test_opcheck_without_optional_arguments():
    case = Case(shape=(7,), optional=())
    for name, arguments in op_arguments(case).items():
        torch.library.opcheck(getattr(ops, name).default, arguments)


def _train(velocity, old, latents, coef, key, advantages):
    following, log_prob = tk.transition_step(latents, old, coef, key, siblings=3)
    ratios = tk.log_ratio(velocity, old, coef, key, siblings=3)
    again = tk.transition_log_prob(following, latents, velocity, coef)
    terms = tk.gaussian_terms(coef)
    loss, stats = tk.branch_loss(velocity, old, advantages, terms, key, clip_range=(1e-3, 1e-3))
    return loss + ratios.mean() + again.mean(), following, log_prob, stats.clip_fraction


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_without_graph_breaks(dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(_train, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows, size in ((4, 10), (3, 17), (2, 8)):
        case = Case(shape=(2, size), rows=rows)
        names = ("velocity_old", "latents", "coef", "key", "advantages")
        inputs = [getattr(case, name) for name in names]
        eager, traced = (case.velocity.clone().requires_grad_() for _ in range(2))
        expected, found = _train(eager, *inputs), compiled(traced, *inputs)
        for a, b in zip(expected, found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
        expected[0].backward()
        found[0].backward()
        torch.testing.assert_close(eager.grad, traced.grad)
    if dynamic:
        assert len(torch._dynamo.eval_frame._debug_get_cache_entry_list(_train)) <= 2


@pytest.mark.parametrize(
    ("backend", "expected"),
    [("reference", "reference"), ("fortran", "ValueError: TEMPFLOW_KERNELS_BACKEND: found 'fortran'"),
     ("native", "RuntimeError: no C++ library at /nowhere")],
)  # fmt: skip
def test_backend_can_be_chosen_and_a_missing_one_is_an_error(backend, expected):
    program = "import tempflow_kernels as tk; print(tk.backend_info()['cpu'])"
    environment = os.environ | {
        "TEMPFLOW_KERNELS_BACKEND": backend, "TEMPFLOW_KERNELS_LIBRARY": "/nowhere",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }  # fmt: skip
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert expected in run.stdout + run.stderr


def test_backend_info_names_every_backend():
    info = tk.backend_info()
    assert info["cpu"] in ("native", "reference") and info["cuda"] in ("triton", "reference")
    assert {"native", "triton", "torch", "namespace"} <= set(info)
