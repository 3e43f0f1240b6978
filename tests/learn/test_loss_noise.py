"""The loss takes the noise of the branches from keys or stored: the same numbers, chosen by what was measured."""

import pytest
import torch
from oracle import Facts
from step_comparison import pair
from toy_trainer import make_trainer, panel_of, shifted, small, tilt

from tempflow.common.capture import CaptureBroken
from tempflow.common.errors import BadInput
from tempflow.learn import noise
from tempflow.learn.noise import LossNoise, Shape, choose_noise, measure
from tempflow.parallel.ranks import Ranks
from tempflow.train import train_step

CPU, GPU = (Ranks(0, 1, torch.device(name)) for name in ("cpu", "cuda"))
SHAPE = Shape(4, 6, (16, 64, 64), False)
KINDS = {
    "siblings": ["explore.noises=2", "explore.siblings=3", "explore.forks=[0,2]"],
    "window": ["explore.noises=2", "explore.siblings=3", "explore.forks=[0,1]", "explore.window=3"],
    "chain with KL": ["explore.noises=4", "explore.siblings=1", "explore.forks=[0]", "explore.window=rest",
                      "objective.kl=0.1"],
}  # fmt: skip
CHANGED = ["learn.inner_epochs=2", "learn.updates=2", "objective.clip=0.004", "learn.lr=0.03"]


def trained(*settings, iterations=3):
    """Parameters after so many iterations."""
    trainer, _ = make_trainer(small(*CHANGED, *settings), panel_of((tilt,), (1.0,)))
    for iteration in range(iterations):
        train_step(trainer, iteration)
    return torch.cat([parameter.detach().flatten() for parameter in trainer.policy.parameters()])


@pytest.mark.parametrize("kind", KINDS)
def test_training_ends_at_the_same_parameters(kind):
    """The noise is equal to the bit and the sums are of the same terms: what is left is their rounding in fp32."""
    found, expected = trained("learn.noise=stored", *KINDS[kind]), trained("learn.noise=key", *KINDS[kind])
    assert (expected - trained(iterations=0)).abs().max() > 0.01
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)


def test_stored_noise_against_the_oracle_too():
    config = small("learn.noise=stored", "explore.noises=2", "explore.siblings=2", "explore.forks=[0,1]",
                   "explore.window=2", "objective.weighting=uniform", "objective.clip=0.004",
                   "learn.inner_epochs=2", "learn.lr=0.03")  # fmt: skip
    facts = Facts(tuple(shifted(5).tolist()), run_seed=3, noises=2, siblings=2, pool=(0, 1), window=2, clip=0.004,
                  inner_epochs=2, lr=0.03)  # fmt: skip
    both = pair(config, facts, (tilt,), (1.0,))
    assert both.trainer.noise.stored
    both.run(2).check()


@pytest.mark.parametrize(("key", "stored", "chosen"), [(21e-6, 28e-6, False), (28e-6, 21e-6, True)])
def test_the_faster_way_on_a_gpu_is_taken_and_said(monkeypatch, capsys, key, stored, chosen):
    monkeypatch.setattr(noise, "measure", lambda shape, way, device: stored if way.stored else key)
    assert choose_noise("auto", SHAPE, GPU, 2**40) == LossNoise(chosen)
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and "21 us" in line and "28 us" in line and "6.0 MiB" in line
    assert line.index("21 us") < line.index("28 us")


def test_all_processes_take_the_way_that_is_faster_on_average(monkeypatch):
    class Two(Ranks):
        def gather(self, values, dim):
            return torch.cat([values, values if values.dtype is torch.bool else torch.tensor([[50e-6, 10e-6]])], dim)

    monkeypatch.setattr(noise, "measure", lambda shape, way, device: 30e-6 if way.stored else 20e-6)
    assert choose_noise("auto", SHAPE, Two(0, 2, torch.device("cuda")), 2**40).stored


def test_where_it_does_not_fit_one_process_all_take_keys(monkeypatch, capsys):
    """And all of them know it by one and the same exchange, or some would wait for the others for ever."""

    class Two(Ranks):
        def gather(self, values, dim):
            exchanged.append(values.dtype)
            return torch.cat([values, torch.zeros_like(values)], dim)

    exchanged = []
    monkeypatch.setattr(noise, "measure", None)
    assert not choose_noise("auto", SHAPE, Two(0, 2, torch.device("cuda")), 2**40).stored
    assert "6.0 MiB" in capsys.readouterr().err
    with pytest.raises(BadInput):
        choose_noise("stored", SHAPE, Two(0, 2, torch.device("cuda")), 2**40)
    assert exchanged == [torch.bool, torch.bool]


def test_a_cpu_takes_keys_without_measuring(monkeypatch):
    monkeypatch.setattr(noise, "measure", None)
    assert choose_noise("auto", SHAPE, CPU, float("inf")) == LossNoise(False)
    assert choose_noise("stored", SHAPE, CPU, float("inf")) == LossNoise(True)


def test_memory_decides_first(monkeypatch):
    monkeypatch.setattr(noise, "measure", lambda shape, way, device: 1.0 - way.stored)
    needed = SHAPE.stored_bytes / noise.FREE_SHARE
    assert choose_noise("auto", SHAPE, GPU, needed + 1).stored
    assert not choose_noise("auto", SHAPE, GPU, needed - 1).stored
    with pytest.raises(BadInput) as caught:
        choose_noise("stored", SHAPE, GPU, needed - 1)
    assert caught.value.field == "learn.noise" and "6.0 MiB" in str(caught.value)


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("stored", [False, True])
def test_both_ways_can_be_measured(stored, reference):
    assert 0 < measure(Shape(2, 3, (2, 4, 4), reference), LossNoise(stored), torch.device("cpu")) < 1


@pytest.mark.parametrize("stored", [False, True])
def test_replays_are_measured_or_else_calls(monkeypatch, stored):
    """Where the capture fails in order, launches count; where CUDA breaks it off, the run cannot go on."""
    seen = []

    def seconds(call, device, captured=True):
        seen.append(captured)
        if captured and error:
            raise error
        return 5.0 if captured else 10.0

    monkeypatch.setattr(noise, "device_seconds", seconds)
    found = {}
    for error in (None, torch.OutOfMemoryError("no room"), RuntimeError("the host waits")):
        found[error] = measure(Shape(2, 3, (2, 4, 4), False), LossNoise(stored), torch.device("cpu"))
    assert list(found.values()) == [1.0, 2.0, 2.0] and seen == [True, True, False, True, False]
    error = CaptureBroken("operation failed")
    with pytest.raises(BadInput) as caught:
        measure(Shape(2, 3, (2, 4, 4), False), LossNoise(stored), torch.device("cpu"))
    assert caught.value.field == "learn.noise"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("stored", [False, True])
def test_the_loss_can_be_captured(monkeypatch, stored):
    """So that what is measured is the GPU, not its launches."""
    seconds = noise.device_seconds
    monkeypatch.setattr(noise, "device_seconds", lambda call, device, captured=True: captured and seconds(call, device))
    assert measure(SHAPE, LossNoise(stored), torch.device("cuda")) > 0
