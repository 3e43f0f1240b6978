"""Which attention backend serves: named, or the fastest at the run's own shape."""

from __future__ import annotations

import pytest
import torch
from tiny_pipelines import TEXTS, model_config, sample_config

from tempflow.common.capture import CaptureBroken
from tempflow.common.errors import BadInput
from tempflow.models import attention
from tempflow.models.load import load_policy

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
