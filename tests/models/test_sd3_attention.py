"""SD3's attention goes through diffusers' dispatcher and computes what diffusers' own does."""

from __future__ import annotations

import copy
import random

import pytest
import tiny_pipelines
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from diffusers.models.attention_processor import Attention, JointAttnProcessor2_0
from torch.nn.attention import SDPBackend

from tempflow.explore.tails.compiled import CompiledBlocks
from tempflow.models import attention
from tempflow.models.families.sd3_attention import JointAttention, make_switchable

SD35 = {"qk_norm": "rms_norm", "dual_attention_layers": (0, 1)}
SD3 = {"qk_norm": None, "dual_attention_layers": ()}


def transformers_of(kind: dict) -> tuple[SD3Transformer2DModel, SD3Transformer2DModel]:
    """The same random network with diffusers' processor and with ours; norms and biases are not trivial."""
    config = dict(tiny_pipelines.sd3().transformer.config) | kind | {"num_layers": 3}
    theirs = SD3Transformer2DModel.from_config(config)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    ours = copy.deepcopy(theirs)
    make_switchable(ours)
    return theirs, ours


def processors(module: torch.nn.Module) -> list:
    return [part.processor for part in module.modules() if isinstance(part, Attention)]


def output_and_gradients(transformer, inputs, dtype):
    """Of a network in autocast; gradients of the latents, the texts and all parameters."""
    given = {name: value.clone().requires_grad_(value.is_floating_point()) for name, value in inputs.items()}
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        output = transformer(**given, return_dict=False)[0].float()
    output.square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in transformer.named_parameters()}
    return output, gradients | {name: value.grad for name, value in given.items()}


@pytest.mark.parametrize(("dtype", "weights"), [("fp32", "fp32"), ("bf16", "bf16"), ("bf16", "fp32")])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("kind", [SD35, SD3], ids=["sd35", "sd3"])
def test_joint_attention_is_diffusers_own_to_the_bit(kind, rows, dtype, weights):
    """Outputs and every gradient, with and without the second attention and norms, up to the last block, which takes
    no text further; trained weights stay in fp32 while autocast computes in bf16.
    """
    precisions = {"fp32": torch.float32, "bf16": torch.bfloat16}
    theirs, ours = (module.to(precisions[weights]) for module in transformers_of(kind))
    assert {type(part) for part in processors(theirs)} == {JointAttnProcessor2_0}
    assert {type(part) for part in processors(ours)} == {JointAttention}
    words = random.randrange(1, 12)
    inputs = {
        "hidden_states": torch.randn(rows, 4, 6, 10),
        "encoder_hidden_states": torch.randn(rows, words, 32),
        "pooled_projections": torch.randn(rows, 32),
        "timestep": torch.rand(rows) * 1000,
    }
    inputs = {name: value.to(precisions[weights]) for name, value in inputs.items()}
    (left, expected), (right, found) = (output_and_gradients(m, inputs, precisions[dtype]) for m in (theirs, ours))
    assert torch.equal(left, right) and expected.keys() == found.keys()
    silent = {name for name, gradient in expected.items() if gradient is None or not gradient.any()}
    assert len(silent) < len(expected) / 2
    for name, gradient in expected.items():
        assert (found[name] is None) == (gradient is None) and (gradient is None or torch.equal(found[name], gradient))


def test_a_policy_of_sd3_uses_it_everywhere(load_tiny):
    """The network that learns, its frozen copy and the copy that tails use."""
    policy = load_tiny("sd3", 2.0, train="full", attention="_native_math")
    with policy.merged():
        merged = policy.network.active
    for module in (policy.network.module, policy.network.frozen, merged):
        found = processors(module)
        assert len(found) == 3 and {part._attention_backend.value for part in found} == {"_native_math"}


def test_what_is_saved_is_a_plain_transformer(load_tiny, tmp_path):
    policy = load_tiny("sd3", train="full")
    policy.save(tmp_path)
    plain = SD3Transformer2DModel.from_pretrained(tmp_path / "transformer")
    assert {type(part) for part in processors(plain)} == {JointAttnProcessor2_0}
    assert plain.state_dict().keys() == policy.network.module.state_dict().keys()


def test_loading_leaves_other_pipelines_alone(tiny, load_tiny):
    load_tiny("sd3")
    plain = StableDiffusion3Pipeline.from_pretrained(tiny("sd3"))
    assert {type(part) for part in processors(plain.transformer)} == {JointAttnProcessor2_0}


class Watch(torch.overrides.TorchFunctionMode):
    """Which kernels torch's attention may choose from, call by call."""

    def __init__(self) -> None:
        super().__init__()
        self.allowed: list[list] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.nn.functional.scaled_dot_product_attention:
            self.allowed.append(torch.nn.attention._cur_sdpa_kernel_backends())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_a_named_backend_is_the_only_one_with_and_without_gradient(load_tiny, name):
    """So a GPU cannot take one kernel for the trunk and another for learning."""
    policy = load_tiny(name, 2.0, attention="_native_math")
    case = attention.Case(policy, 2)
    with Watch() as watch:
        case.forward()
        without = len(watch.allowed)
        case.backward()
    assert without >= 3 and len(watch.allowed) == 2 * without
    assert all(allowed == [SDPBackend.MATH] for allowed in watch.allowed)


@pytest.mark.parametrize("backend", ["native", pytest.param("_native_math", marks=pytest.mark.long)])
def test_compiled_blocks_compute_the_same(load_tiny, disturb, backend):
    policy = load_tiny("sd3", 2.0, attention=backend)
    disturb(policy.trainable(), 0.1)
    case = attention.Case(policy, 2)
    plain, gradients = case.forward(), case.backward()
    with CompiledBlocks(policy.blocks())():
        found, learnt = case.forward(), case.backward()
    torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-5 * plain.abs().max().item())
    for left, right in zip(learnt, gradients, strict=True):
        assert (left is None) == (right is None)
        if right is not None:
            torch.testing.assert_close(left, right, rtol=1e-3, atol=1e-4 * right.abs().max().item())
