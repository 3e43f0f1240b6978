"""Tails on fixed buffers, for compiled blocks and CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from tempflow.common.tensors import to_device
from tempflow.explore.schedule import NoiseSchedule
from tempflow.explore.tails.engine import Numerics, TailWork, tail_step
from tempflow.explore.tails.solver import EXACT, GUIDED, IDLE, SIGMA, TailSolver, TailTable
from tempflow.policy import Conditioning, Policy


class Recorder(Protocol):
    """Turns work on tensors that stay where they are into something that repeats it."""

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """Runs `work` as often as it needs to, and returns what does the same to the same tensors once more.

        Raises:
            RuntimeError: it does not work; nothing has come to harm.
            CaptureBroken: it does not work, and neither does this process any more.
        """
        ...


class Direct:
    """Repeats the work by doing it."""

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        work()  # compiles here, not in the first tail
        return work


class TailBuffers:
    """One network call and one step on tensors that stay where they are, recorded once for every step of every tail;
    where some steps take no guidance, a second time with the conditional rows alone."""

    def __init__(self, policy: Policy, like: Conditioning, rows: int, table: TailTable, recorder: Recorder,
                 numerics: Numerics):  # fmt: skip
        self.policy, self.numerics = policy, numerics
        self.latents = torch.zeros(rows, *policy.latent_shape, device=policy.device)
        self.memory = torch.zeros_like(self.latents) if table.remembers else None
        self.now = torch.tensor(IDLE, device=policy.device).repeat(rows, 1)
        self.no_noise = torch.zeros(rows, 2, dtype=torch.int64, device=policy.device)
        # real rows, for a network may not take zeros
        filled = {name: tensor[:1].repeat(rows, *[1] * (tensor.dim() - 1)) for name, tensor in like.tensors.items()}
        self.conditioning = Conditioning(filled)
        self.replay = recorder.record(lambda: self._work((self.now[:, GUIDED] > 0) if table.switches else True))
        self.replay_unguided = recorder.record(lambda: self._work(False)) if table.switches else self.replay

    def _work(self, guided: Tensor | bool) -> None:
        with self.numerics():
            sigma = self.now[:, SIGMA].contiguous()
            velocity = self.policy.velocity(self.latents, sigma, self.conditioning, guided)
        tail_step(self.latents, velocity, self.now, self.no_noise, self.memory)

    def load(self, latents: Tensor, conditioning: Conditioning) -> None:
        """Puts B branches into the first rows; what is left in the others is finite, and they stay where they are."""
        self.latents[: len(latents)].copy_(latents)
        for name, tensor in conditioning.tensors.items():
            self.conditioning.tensors[name][: len(tensor)].copy_(tensor)
        if self.memory is not None:
            self.memory.zero_()


class BufferStore:
    """The buffers of one kind of network call, recorded at the first use of their shapes."""

    def __init__(self, policy: Policy, rows: int, recorder: Recorder, numerics: Numerics):
        self.policy, self.rows, self.recorder, self.numerics = policy, rows, recorder, numerics
        self.known: dict[tuple, TailBuffers] = {}

    def buffers(self, like: Conditioning, table: TailTable) -> TailBuffers:
        shapes = tuple((name, tensor.shape[1:], tensor.dtype) for name, tensor in like.tensors.items())
        key = (table.remembers, table.switches, *shapes)
        if key not in self.known:
            self.known[key] = TailBuffers(self.policy, like, self.rows, table, self.recorder, self.numerics)
        return self.known[key]


class StaticEngine:
    """Network calls of one shape and one place in memory, for compiled blocks and CUDA graphs.

    Branches that have not set out yet stay where they are by their coefficients, and a short chunk is padded likewise:
    both are computed for nothing, and counted. From the first step to the last the host waits for nothing.
    """

    def __init__(self, store: BufferStore, solver: TailSolver = EXACT):
        self.store, self.rows, self.solver, self.work = store, store.rows, solver, TailWork()

    def halve(self, tried: int) -> bool:
        return False  # its buffers are there from the first call on, and keep their size

    @torch.no_grad()
    def finish(
        self, latents: Tensor, first_steps: Sequence[int], conditioning: Conditioning, schedule: NoiseSchedule
    ) -> None:
        table = self.solver.table(schedule)
        buffers = self.store.buffers(conditioning, table)
        buffers.load(latents, conditioning)
        stages = _padded(table.stages(first_steps, latents.device), self.rows)
        for now, count, guided in zip(stages, table.under_way(first_steps), table.guided(first_steps), strict=True):
            buffers.now.copy_(now)
            (buffers.replay if guided else buffers.replay_unguided)()
            self.work.add(self.rows, count, guided)
        latents.copy_(buffers.latents[: len(latents)])


def _padded(stages: Tensor, rows: int) -> Tensor:
    """(stages, B, 8) to (stages, rows, 8): rows without a branch stay idle."""
    missing = rows - stages.shape[1]
    if not missing:
        return stages
    idle = to_device(torch.tensor(IDLE), stages.device).expand(len(stages), missing, -1)
    return torch.cat((stages, idle), dim=1)
