"""Fixtures shared by all tests: a toy policy whose rows are exactly independent, and the shipped pipeline."""

from __future__ import annotations

import os

if "PYTEST_XDIST_WORKER" in os.environ:  # before torch is imported: as many threads as cores in all
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import random
import signal
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import tiny_pipelines
import torch
from beside import begun, pytest_collection_finish, pytest_collection_modifyitems, pytest_sessionfinish
from fake_cuda import FakeCuda
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from tempflow.explore.schedule import NoiseSchedule, build_schedule
from tempflow.models.load import load_policy
from tempflow.policy import Conditioning
from tempflow.settings.fields import ModelConfig, SampleConfig

if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # pytest under nohup: what a run does at a hang-up is tested
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

HOOKS = (begun, pytest_collection_finish, pytest_collection_modifyitems, pytest_sessionfinish)
SD35_SIGMAS = (1.0, 0.9601, 0.9133, 0.8577, 0.7904, 0.7073, 0.6022, 0.4649, 0.278, 0.0089, 0.0)


class ToyPolicy(nn.Module):
    """A policy on (2, 3) latents: elementwise, so that a row's velocity cannot depend on the batch it is in."""

    def __init__(self) -> None:
        super().__init__()
        self.device = torch.device("cpu")
        self.latent_shape, self.image_shape, self.network_rows = (2, 3), (3, 2, 3), 1
        self.scale = nn.Parameter(torch.tensor([0.7, -0.4, 0.2]))
        self.bias = nn.Parameter(torch.tensor([[0.1], [-0.3]]))
        self.calls: list[int] = []
        self.own = (self.scale, self.bias)
        self.copies: tuple[Tensor, Tensor] | None = None

    def sigmas(self, num_steps: int) -> Tensor:
        return torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)

    def encode(self, texts: Sequence[str]) -> Conditioning:
        return Conditioning({"shift": torch.tensor([float(len(text)) for text in texts]) / 10})

    def velocity(self, latents: Tensor, sigma: Tensor, conditioning: Conditioning, guided: object = True) -> Tensor:
        self.calls.append(len(latents))
        shift = conditioning.tensors["shift"].view(-1, 1, 1) * sigma.view(-1, 1, 1)
        scale, bias = self.own
        return latents * scale + bias * shift

    def decode(self, latents: Tensor) -> Tensor:
        grey = (latents.clamp(-2, 2) * 60 + 128).round().to(torch.uint8)
        return grey.unsqueeze(1).expand(-1, 3, -1, -1)

    def trainable(self) -> dict[str, nn.Parameter]:
        return dict(self.named_parameters())

    @contextmanager
    def reference(self) -> Iterator[None]:
        yield

    @contextmanager
    def merged(self) -> Iterator[None]:
        """A copy that is in the trained weights' precision, so that only being out of date can tell them apart."""
        if self.copies is None:
            self.copies = (self.scale.detach().clone(), self.bias.detach().clone())
        before, self.own = self.own, self.copies
        yield
        self.own = before

    @torch.no_grad()
    def refresh_merged(self) -> None:
        for copy, own in zip(self.copies or (), (self.scale, self.bias), strict=False):
            copy.copy_(own)

    def blocks(self) -> list[nn.Module]:
        return []

    def prepare_decoder(self, compiled: bool) -> None:
        pass


ON_THE_HOST = (torch.ops.aten.lift_fresh.default, torch.ops.aten.nonzero.default, torch.ops.aten.masked_select.default)
"""Numbers that the host makes a tensor of, and shapes that depend on values."""


class StrictRecorder:
    """Stands in for CUDA graphs on a CPU: repeats the work, and fails where a captured graph would not have followed.

    That is where a tensor from outside of the work has moved or changed its shape, where a number that the host passed
    to an operator has changed, or where the operators themselves have; and where the host would have to wait.
    """

    def __init__(self) -> None:
        self.recorded, self.replayed = 0, 0

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        work()
        captured = self._traced(work)
        self.recorded += 1

        def replay() -> None:
            assert self._traced(work) == captured, "a captured graph would not have seen this change"
            self.replayed += 1

        return replay

    @staticmethod
    def _traced(work: Callable[[], None]) -> list[tuple]:
        calls, own = [], set()

        class Watch(TorchDispatchMode):
            def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
                assert operator not in ON_THE_HOST, f"{operator} makes the host wait: no graph can hold it"
                before, _ = tree_flatten((args, kwargs))
                calls.append((str(operator), *(_identity(value, own) for value in before)))
                result = operator(*args, **(kwargs or {}))
                outside = {_place(value) for value in before if isinstance(value, Tensor)} - own
                made = {_place(value) for value in tree_flatten(result)[0] if isinstance(value, Tensor)}
                own.update(made - outside)
                return result

        with Watch():
            work()
        return calls


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _identity(value, own: set[int]):
    """What a graph holds fast of an argument: shape and, of tensors from outside, the place; any other value itself."""
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype, None if _place(value) in own else value.data_ptr()
    return repr(value)


@pytest.fixture
def strict_recorder() -> StrictRecorder:
    return StrictRecorder()


@pytest.fixture
def toy() -> ToyPolicy:
    return ToyPolicy()


@pytest.fixture
def schedule() -> NoiseSchedule:
    """Ten steps in the spacing of SD3.5."""
    return build_schedule(SD35_SIGMAS, "flow_sde", 0.7)


@pytest.fixture(scope="session")
def cpu() -> torch.device:
    return torch.device("cpu")


@pytest.fixture
def digits_policy(cpu: torch.device):
    """The shipped SD3 pipeline with adapters that do something (their output halves are not 0)."""
    torch.manual_seed(0)
    policy = load_policy(ModelConfig(text_tokens=16), SampleConfig(), cpu)
    _disturb(policy.trainable(), 0.05)
    return policy


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """name -> folder of a saved tiny pipeline (see tiny_pipelines.py), written once."""
    folders: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in folders:
            folders[name] = tiny_pipelines.save(name, tmp_path_factory.mktemp("tiny") / name)
        return folders[name]

    return folder


@pytest.fixture
def load_tiny(tiny, cpu: torch.device):
    """Loads a tiny pipeline as a policy, with `model` settings: `load_tiny(name, guidance, size, dtype="bf16")`."""

    def load(name, guidance=None, size=tiny_pipelines.SIZE, keep_reference=True, **model):
        torch.manual_seed(1)
        settings = tiny_pipelines.model_config(tiny(name), name, **model)
        return load_policy(settings, tiny_pipelines.sample_config(name, guidance, size), cpu, keep_reference)

    return load


@pytest.fixture(scope="session")
def disturb():
    """Moves every parameter by normal noise of a size: `disturb(parameters, size)`."""
    return _disturb


@torch.no_grad()
def _disturb(parameters: dict[str, nn.Parameter], size: float) -> None:
    for parameter in parameters.values():
        parameter.add_(torch.randn_like(parameter) * size)


SEED = int(os.environ.get("TEMPFLOW_TEST_SEED") or random.SystemRandom().randrange(2**31))


def pytest_report_header() -> str:
    return f"random numbers of the tests: TEMPFLOW_TEST_SEED={SEED}"


@pytest.fixture(autouse=True)
def seeded(request: pytest.FixtureRequest) -> None:
    """A fresh stream for each test, the same again with the seed that is printed at the top of every run."""
    torch.manual_seed(SEED + zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture
def cuda(monkeypatch):
    """A stand-in for `torch.cuda`, in its place."""
    fake = FakeCuda()
    fake.install(monkeypatch)
    return fake
