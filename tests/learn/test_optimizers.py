"""Optimizers: what their state weighs, exact resume, steps that must not be taken, loss scaling."""

import importlib.util

import pytest
import torch
from torch.nn import Parameter

from tempflow.common.errors import BadInput, Halted
from tempflow.learn.average import MovingAverage
from tempflow.learn.optimizers import (
    OPTIMIZERS,
    check_device,
    estimated_state_bytes,
    load_state,
    make_optimizer,
    state_bytes,
)
from tempflow.learn.stepper import PATIENCE, LossScale, Stepper
from tempflow.models.load import load_policy
from tempflow.run import checkpoint
from tempflow.run.snapshot import Progress, take
from tempflow.settings.fields import LearnConfig, ModelConfig, SampleConfig

bitsandbytes = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
ON_CPU = ["adamw", pytest.param("adamw8bit", marks=bitsandbytes)]
SIZES = {"large": (96, 50), "bias": (50,), "odd": (4099,)}
"""4800 elements in 19 blocks, a tensor below bitsandbytes' limit, and a last block of 3 elements"""


def stepper(name: str, scale: bool = False, **learn) -> Stepper:
    torch.manual_seed(0)
    parameters = {key: Parameter(torch.randn(size)) for key, size in SIZES.items()}
    settings = LearnConfig(**{"optimizer": name, "lr": 0.01} | learn)
    optimizer = make_optimizer(settings, list(parameters.values()))
    loss_scale = LossScale(torch.device("cpu")) if scale else None
    return Stepper(parameters, optimizer, MovingAverage(parameters, 0.9, 1), 1.0, loss_scale)


def steps(moved: Stepper, seed: int, count: int = 3, size: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        for parameter in moved.parameters.values():
            parameter.grad = torch.randn(parameter.shape, generator=generator) * size
        moved.step()


def everything(moved: Stepper) -> dict[str, torch.Tensor]:
    state = {
        f"{number}.{name}": torch.as_tensor(value)
        for number, values in enumerate(moved.optimizer.state.values())
        for name, value in values.items()
    }
    return {name: tensor.detach().clone() for name, tensor in (state | moved.parameters).items()}


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


@pytest.mark.parametrize("scale", [False, True], ids=["fp32", "loss scale"])
@pytest.mark.parametrize("name", ON_CPU)
def test_a_resumed_optimizer_continues_bit_by_bit(tmp_path, name, scale):
    whole, stopped, resumed = (stepper(name, scale) for _ in range(3))
    for moved in (whole, stopped):
        steps(moved, 1)
        if scale:
            steps(moved, 1, count=1, size=float("inf"))
    checkpoint.save(tmp_path, take(Progress(3), stopped, {}), keep=1)
    checkpoint.restore(tmp_path, resumed)
    assert_equal(everything(resumed), everything(whole))
    for moved in (whole, resumed):
        steps(moved, 2)
    assert_equal(everything(resumed), everything(whole))
    assert not scale or resumed.read()["loss_scale"] == whole.read()["loss_scale"] == LossScale.START / 2
    assert {path.suffix for path in (tmp_path / "step_000003").iterdir()} == {".safetensors", ".json"}


@pytest.mark.parametrize("name", ON_CPU)
def test_state_weighs_what_was_announced(name):
    moved, learn = stepper(name), LearnConfig(optimizer=name)
    assert state_bytes(moved.optimizer) == 0
    steps(moved, 1, count=1)
    numbers = [tensor.numel() for tensor in moved.parameters.values()]
    overhead = 4 * len(numbers) if name == "adamw" else 2 * 4 * 256  # counters, or the two shared quantisation maps
    assert state_bytes(moved.optimizer) - overhead == estimated_state_bytes(learn, numbers)
    assert estimated_state_bytes(learn, numbers) == {"adamw": 71592, "adamw8bit": 18486}[name]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("name", ON_CPU)
def test_no_step_is_taken_where_the_norm_is_not_finite(name, bad):
    """1e30 is finite, but the norm of such gradients is not."""
    moved = stepper(name)
    steps(moved, 1)
    before = everything(moved)
    moved.read()
    for parameter in moved.parameters.values():
        parameter.grad = torch.full_like(parameter, bad)
    moved.step()
    assert_equal(everything(moved), before)
    assert moved.read() == {"grad_norm": 0.0, "skipped_steps": 1, "optimizer_bytes": state_bytes(moved.optimizer)}
    steps(moved, 2, count=1)
    assert not torch.equal(moved.parameters["bias"], before["bias"]) and moved.read()["grad_norm"] > 0


@bitsandbytes
def test_small_tensors_can_have_eight_bits_too():
    moved = stepper("adamw8bit", min_8bit_size=1)
    steps(moved, 1, count=1)
    learn = LearnConfig(optimizer="adamw8bit", min_8bit_size=1)
    assert state_bytes(moved.optimizer) - 2048 == estimated_state_bytes(learn, [4800, 50, 4099]) == 18486 - 400 + 108
    assert moved.optimizer.state[moved.parameters["bias"]]["state2"].dtype == torch.uint8


@bitsandbytes
def test_eight_bits_stay_near_fp32():
    full, eight = stepper("adamw"), stepper("adamw8bit")
    start = torch.cat([value.detach().flatten().clone() for value in full.parameters.values()])
    for moved in (full, eight):
        steps(moved, 3, count=20)
    ends = [torch.cat([v.detach().flatten() for v in moved.parameters.values()]) for moved in (full, eight)]
    assert (ends[0] - ends[1]).norm() < 0.1 * (ends[0] - start).norm()
    assert eight.optimizer.state[eight.parameters["large"]]["state1"].dtype == torch.uint8


@bitsandbytes
def test_a_paged_state_returns_to_pages(monkeypatch):
    """On a CPU bitsandbytes has no pages, but the way back is the same: into buffers of the optimizer's own making."""
    from bitsandbytes.optim import PagedAdamW8bit

    made = []
    monkeypatch.setattr(PagedAdamW8bit, "get_state_buffer",
                        lambda self, p, dtype: made.append(torch.zeros_like(p, dtype=dtype)) or made[-1])  # fmt: skip
    parameter = Parameter(torch.randn(5000))
    optimizers = [PagedAdamW8bit([parameter], lr=0.1) for _ in range(2)]
    parameter.grad = torch.ones(5000)
    optimizers[0].step()
    load_state(optimizers[1], optimizers[0].state_dict())
    first, second = (optimizer.state[parameter] for optimizer in optimizers)
    assert second["state1"] is made[2] and second["state2"] is made[3] and second["step"] == 1
    assert all(torch.equal(second[name], first[name]) for name in ("state1", "state2", "absmax1", "absmax2"))


def test_wrong_optimizers_are_refused_in_one_line(monkeypatch):
    parameters = [Parameter(torch.ones(2))]
    if importlib.util.find_spec("bitsandbytes") is not None:
        for refused in (lambda: make_optimizer(LearnConfig(optimizer="paged_adamw8bit"), parameters),
                        lambda: check_device("adamw8bit", "mps")):  # fmt: skip
            with pytest.raises(BadInput) as caught:
                refused()
            assert caught.value.field == "learn.optimizer" and "\n" not in str(caught.value)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BadInput, match=r"pip install 'tempflow\[gpu\]'") as caught:
        make_optimizer(LearnConfig(optimizer="adamw8bit"), parameters)
    assert caught.value.field == "learn.optimizer"


def test_every_optimizer_of_the_settings_exists():
    names = LearnConfig.__pydantic_fields__["optimizer"].annotation.__args__
    assert set(names) == set(OPTIMIZERS)


@pytest.mark.parametrize("name", ON_CPU)
def test_the_loss_scale_changes_no_step(name):
    """A power of two, so that scaling and unscaling is exact in fp32."""
    plain, scaled = stepper(name), stepper(name, scale=True)
    scaled.scale.scale.fill_(8.0)
    for moved in (plain, scaled):
        for _ in range(2):
            moved.backward(sum((parameter**2).sum() for parameter in moved.parameters.values()))
            moved.step()
    assert_equal(everything(scaled), everything(plain))
    assert scaled.read() == plain.read() | {"loss_scale": 8.0}


def test_the_loss_scale_halves_on_overflow_and_grows_after_a_while():
    moved = stepper("adamw", scale=True)
    steps(moved, 1)
    before = everything(moved)
    steps(moved, 1, count=2, size=float("inf"))
    assert_equal(everything(moved), before)
    figures = moved.read()
    start = LossScale.START
    assert (figures["loss_scale"], figures["skipped_steps"]) == (start / 4, 2) and figures["grad_norm"] > 0
    steps(moved, 1, count=LossScale.INTERVAL - 1)
    assert moved.read()["loss_scale"] == start / 4
    steps(moved, 1, count=1)
    assert moved.read()["loss_scale"] == start / 2


def test_fp16_learns_what_fp32_learns(cpu):
    """Autocast to fp16, the loss scale and its way back: the gradient of fp32 to a few parts in a hundred."""
    gradients = {}
    for dtype in ("fp32", "fp16"):
        torch.manual_seed(0)
        policy = load_policy(ModelConfig(dtype=dtype, vae_dtype="fp32", text_dtype="fp32", text_tokens=16),
                             SampleConfig(), cpu)  # fmt: skip
        parameters = policy.trainable()
        for parameter in parameters.values():
            parameter.data.normal_(std=0.05)
        optimizer, average = torch.optim.AdamW(parameters.values(), fused=True), MovingAverage(parameters, 0.9, 1)
        moved = Stepper(parameters, optimizer, average, 1.0, LossScale(cpu) if dtype == "fp16" else None)
        velocity = policy.velocity(torch.randn(2, 4, 8, 8), torch.tensor([0.9, 0.4]), policy.encode(["a", "b"]))
        moved.backward(1e-7 * velocity.square().mean())
        scale = LossScale.START if dtype == "fp16" else 1.0
        gradients[dtype] = torch.cat([parameter.grad.flatten() for parameter in parameters.values()]) / scale
        moved.step()
        assert moved.read()["grad_norm"] == pytest.approx(gradients[dtype].norm().item(), rel=1e-5)
    assert (gradients["fp16"] - gradients["fp32"]).norm() < 0.05 * gradients["fp32"].norm()


def test_endless_overflow_ends_the_run():
    moved = stepper("adamw", scale=True)
    steps(moved, 1, count=PATIENCE - 1, size=float("nan"))
    moved.read()
    steps(moved, 1, count=1, size=float("nan"))
    with pytest.raises(Halted) as caught:
        moved.read()
    assert caught.value.field == "model.dtype"


def test_the_host_reads_nothing_while_stepping(monkeypatch):
    """With torch's AdamW no value is asked for between backward and `read`, whatever the gradient."""
    moved = stepper("adamw", scale=True)
    steps(moved, 1, count=1)

    def refuse(*_):
        raise AssertionError("the host waits for the device")

    for method in ("item", "tolist", "__bool__", "__float__", "cpu", "numpy"):
        monkeypatch.setattr(torch.Tensor, method, refuse)
    steps(moved, 2, count=2)
    steps(moved, 2, count=1, size=float("nan"))
    moved.idle()
