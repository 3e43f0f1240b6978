"""Attention whose kernel can be chosen: SD3's own processor against diffusers', and how a backend is found."""

from __future__ import annotations

import copy
import random

import pytest
import tiny_pipelines
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from diffusers.models.attention_processor import Attention, JointAttnProcessor2_0
from tiny_pipelines import TEXTS, model_config, sample_config
from torch.nn.attention import SDPBackend

from tempflow.common.capture import CaptureBroken
from tempflow.common.errors import BadInput
from tempflow.explore.tails.compiled import CompiledBlocks
from tempflow.models import attention
from tempflow.models.families.sd3_attention import JointAttention, make_switchable
from tempflow.models.load import load_policy

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


@pytest.mark.parametrize("backend", ["native", "_native_math"])
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


BACKENDS = [("sd3", "_native_math"), ("flux", "_native_math"), ("z_image", "_native_math"), ("qwen_image", "native")]


@pytest.mark.parametrize(("name", "backend"), BACKENDS)
def test_attention_backends_agree(load_tiny, name, backend):
    native, other = load_tiny(name, 2.0), load_tiny(name, 2.0, attention=backend)
    assert native.attention == "native" and other.attention == backend
    case = attention.Case(native, 3)
    assert (case.forward() - other.velocity(*case.arguments)).abs().max() < 1e-5
    assert {part._attention_backend.value for part in processors_of(other)} == {backend}


def processors_of(policy) -> list:
    return [part.processor for part in policy.network.module.modules() if hasattr(part, "processor")]


@pytest.mark.parametrize("name", ["sd3", "flux", "z_image"])
def test_the_fastest_usable_backend_is_found(load_tiny, name):
    """What runs on a GPU with attention=auto; here cuDNN and flash-attn are not usable."""
    policy = load_tiny(name)
    best, told = attention.fastest(policy, 2).split(" ", 1)
    second = "_native_efficient" if name == "z_image" else "_native_flash"
    assert "native " in told and "cudnn" not in told and ", flash " not in told
    assert f"{second} " in told or name == "z_image"
    assert {part._attention_backend.value for part in processors_of(policy)} == {best}
    assert all(parameter.grad is None for parameter in policy.trainable().values())


class FakeTimer:
    """Seconds by backend, without and with backward pass; notes the rows of each call and whether it had gradient."""

    def __init__(self, policy, seconds: dict[str, tuple[float, float]], monkeypatch):
        self.policy, self.seconds, self.seen, self.inside = policy, seconds, [], False
        velocity = policy.velocity

        def look(latents, *rest):
            if self.inside:
                self.seen.append((tuple(latents.shape), torch.is_grad_enabled()))
            return velocity(latents, *rest)

        monkeypatch.setattr(policy, "velocity", look)

    def __call__(self, call, device, captured=True):
        self.inside = True
        call()
        self.inside = False
        name = processors_of(self.policy)[0]._attention_backend.value
        return self.seconds[name][self.seen[-1][1]]


def test_backends_are_compared_at_the_runs_own_shape(load_tiny, monkeypatch):
    """All rows of a learning call, without gradient and with the backward pass, and said so."""
    policy = load_tiny("sd3", 2.0)
    timer = FakeTimer(policy, {"native": (0.010, 0.030), "_native_flash": (0.011, 0.020)}, monkeypatch)
    told = attention.fastest(policy, 5, seconds=timer)
    shape = (5, *policy.latent_shape)
    assert timer.seen == [(shape, False)] * 2 + [(shape, True)] * 2
    assert told.startswith("_native_flash ") and "5 x 4 x 8 x 12" in told
    assert "native 10.0 + 30.0 ms" in told and "_native_flash 11.0 + 20.0 ms" in told


def test_a_tie_leaves_native(load_tiny, monkeypatch):
    policy = load_tiny("sd3")
    timer = FakeTimer(policy, {"native": (0.010, 0.030), "_native_flash": (0.010, 0.0298)}, monkeypatch)
    assert attention.fastest(policy, 2, seconds=timer).startswith("native ")


def test_processes_choose_alike(load_tiny, monkeypatch):
    """By the slowest of them: here another process finds flash attention slow, or cannot use it."""
    for other in (0.05, float("inf")):
        policy = load_tiny("sd3")
        timer = FakeTimer(policy, {"native": (0.010, 0.030), "_native_flash": (0.005, 0.015)}, monkeypatch)
        elsewhere = torch.tensor([[0.010, 0.030], [torch.inf] * 2, [0.005, other], [torch.inf] * 2, [torch.inf] * 2])
        told = attention.fastest(policy, 2, lambda times, e=elsewhere: torch.maximum(times, e.double()), timer)
        assert told.startswith("native ") and processors_of(policy)[0]._attention_backend.value == "native"


def test_a_run_hands_its_rows_to_the_comparison(tiny, cpu, monkeypatch):
    seen = []
    monkeypatch.setattr("tempflow.models.load.set_attention", lambda policy, *rest: seen.append(rest))
    load_policy(model_config(tiny("sd3"), "sd3"), sample_config("sd3"), cpu, rows=7, slowest=torch.clone)
    assert seen == [("auto", 7, torch.clone)]


def test_gradients_that_do_not_repeat_the_trunk_are_told(load_tiny, monkeypatch):
    policy = load_tiny("sd3")
    case = attention.Case(policy, 2)
    assert "equal" in case.repeats()
    velocity = policy.velocity
    monkeypatch.setattr(policy, "velocity", lambda *a: velocity(*a) + 1e-6 * torch.is_grad_enabled())
    assert "differs by" in case.repeats()


FLASH_WINS = {"native": (0.010, 0.030), "_native_flash": (0.005, 0.015)}


class Fallible(FakeTimer):
    """Fails by backend, gradient and whether the call is captured; launches, where they count, take a second."""

    def __init__(self, policy, monkeypatch, failures: dict[tuple[str, bool, bool], Exception]):
        super().__init__(policy, FLASH_WINS, monkeypatch)
        self.failures = failures

    def __call__(self, call, device, captured=True):
        seconds = super().__call__(call, device)
        key = processors_of(self.policy)[0]._attention_backend.value, self.seen[-1][1], captured
        if key in self.failures:
            raise self.failures[key]
        return seconds + (not captured)


NO_ROOM, NO_STATE = torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("Cannot get a state\nin a capture")


@pytest.mark.parametrize("error", [NO_ROOM, NO_STATE])
@pytest.mark.parametrize("fails", ["native", "_native_flash"])
@pytest.mark.parametrize("gradient", [False, True])
def test_all_backends_are_timed_in_one_way(load_tiny, monkeypatch, capsys, error, fails, gradient):
    """Where one of them cannot be captured none is, with the same kind of call, and a line says why."""
    policy = load_tiny("sd3")
    told = attention.fastest(policy, 2, seconds=Fallible(policy, monkeypatch, {(fails, gradient, True): error}))
    native, flash = ("10.0 + 1030.0", "5.0 + 1015.0") if gradient else ("1010.0 + 30.0", "1005.0 + 15.0")
    assert told.startswith("_native_flash ") and f"native {native} ms" in told and f"flash {flash} ms" in told
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and str(error).split()[-1] in line


def test_a_capture_that_cuda_breaks_off_ends_in_one_line(load_tiny, monkeypatch):
    policy = load_tiny("sd3")
    failures = {("_native_flash", True, True): CaptureBroken("operation failed\nduring capture")}
    with pytest.raises(BadInput) as caught:
        attention.fastest(policy, 2, seconds=Fallible(policy, monkeypatch, failures))
    assert caught.value.field == "model.attention" and "native" in caught.value.hint and "\n" not in str(caught.value)


@pytest.mark.parametrize("gradient", [False, True])
def test_a_backend_without_enough_memory_is_left_out(load_tiny, monkeypatch, gradient):
    """When timed; native's lack of memory is the run's."""
    for name in ("_native_flash", "native"):
        policy = load_tiny("sd3")
        timer = Fallible(policy, monkeypatch, {(name, gradient, captured): NO_ROOM for captured in (True, False)})
        if name == "native":
            with pytest.raises(torch.OutOfMemoryError):
                attention.fastest(policy, 2, seconds=timer)
        else:
            told = attention.fastest(policy, 2, seconds=timer)
            assert told.startswith("native ") and "flash" not in told


def test_a_backend_without_enough_memory_is_left_out_when_tried(load_tiny, monkeypatch):
    """Likewise before it is timed."""
    policy = load_tiny("sd3")
    velocity = policy.velocity

    def scarce(*arguments):
        if processors_of(policy)[0]._attention_backend.value == "_native_flash":
            raise NO_ROOM
        return velocity(*arguments)

    monkeypatch.setattr(policy, "velocity", scarce)
    told = attention.fastest(policy, 2, seconds=FakeTimer(policy, FLASH_WINS, monkeypatch))
    assert told.startswith("native ") and "flash" not in told


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_auto_on_a_gpu_tells_what_it_measured(tiny, checkpointing):
    """A checkpoint reads the generator's state, which a capture may refuse."""
    config = model_config(tiny("sd3"), "sd3", dtype="bf16", gradient_checkpointing=checkpointing)
    policy = load_policy(config, sample_config("sd3", 2.0), torch.device("cuda"), rows=4)
    print(policy.attention)
    assert "native " in policy.attention and "4 x 4 x 8 x 12" in policy.attention
    policy.velocity(torch.randn(3, *policy.latent_shape, device="cuda"), torch.full((3,), 0.5, device="cuda"),
                    policy.encode(TEXTS))  # fmt: skip
