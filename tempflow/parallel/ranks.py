"""Several processes, one run: prompts are shared out whole, gradients are averaged, rewards are seen by all."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import accumulate
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import Parameter

from tempflow.common.clock import PhaseClock
from tempflow.common.errors import BadInput
from tempflow.common.failures import as_line
from tempflow.common.say import say
from tempflow.parallel.environment import read_place

Result = TypeVar("Result")


@dataclass(frozen=True)
class Ranks:
    """This process among all. Whole sibling groups, and all noises of a prompt, stay on one rank."""

    rank: int
    size: int
    device: torch.device
    patience: float = field(default=0.0, kw_only=True)
    """seconds that it waits for the others before it gives up"""
    in_step: bool = field(default=False, kw_only=True)
    """a network call is one of all processes: each has to make the same ones"""

    @property
    def first(self) -> bool:
        return self.rank == 0

    def share(self, total: int) -> range:
        """This rank's part of `total` items; `size` divides `total`."""
        part = total // self.size
        return range(self.rank * part, (self.rank + 1) * part)

    def gather(self, values: Tensor, dim: int) -> Tensor:
        """The tensors of all ranks, in rank order along `dim`; they stay on the CPU."""
        if self.size == 1:
            return values
        local = values.to(self.device).contiguous()
        parts = [torch.empty_like(local) for _ in range(self.size)]
        dist.all_gather(parts, local)
        return torch.cat(parts, dim).cpu()

    def largest(self, values: Tensor) -> Tensor:
        """The largest of each value over all ranks."""
        return self.gather(values[None], 0).amax(0)

    def agree(self, work: Callable[[], Result], field: str = "reward") -> Result:
        """What `work` returns; where it fails on any rank, all of them stop instead of waiting for one another.

        Args:
            field: the setting that other ranks name where one fails; the first that does says why.
        Raises:
            BadInput: of this rank, or one that says that another rank failed.
        """
        result, problem = None, None
        try:
            result = work()
        except BadInput as error:
            problem = error
        except Exception as error:
            problem = BadInput(*as_line(error))
            problem.__cause__ = error
        failed = self.gather(torch.tensor([int(problem is not None)]), 0)
        if not failed.any():
            return result
        if problem and not self.first and int(failed.argmax()) == self.rank:
            say(f"process {self.rank}: {problem}", everywhere=True)
        raise problem or BadInput(field, f"rank {self.rank}", f"{self._names(failed)} could not go on and says why")

    def _names(self, failed: Tensor) -> str:
        """The processes that failed."""
        return "process " + ", ".join(str(rank) for rank in failed.nonzero().flatten().tolist())

    def average_gradients(self, parameters: Iterable[Parameter]) -> None:
        """Replaces each gradient by its mean over ranks, bucket by bucket; a rank without one counts as 0. Gradients of
        parameters that are shared out are means already."""
        if self.size == 1:
            return
        gradients = [_gradient(parameter) for parameter in parameters if not isinstance(parameter, DTensor)]
        while gradients:
            sizes = list(accumulate(gradient.nbytes for gradient in gradients))
            count = max(1, bisect_right(sizes, BUCKET))
            self._average(gradients[:count])
            gradients = gradients[count:]

    def _average(self, bucket: list[Tensor]) -> None:
        flat = torch.cat([gradient.flatten() for gradient in bucket])
        dist.all_reduce(flat)
        flat /= self.size
        for gradient, part in zip(bucket, flat.split([gradient.numel() for gradient in bucket]), strict=True):
            gradient.copy_(part.view_as(gradient))

    def wait(self) -> None:
        """All ranks meet here."""
        if self.size > 1:
            dist.barrier()


def _gradient(parameter: Parameter) -> Tensor:
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


def backend_of(gpu: bool, offload: bool) -> str:
    """What processes meet by: with shares in main memory there, too."""
    return ("cpu:gloo,cuda:nccl" if offload else "nccl") if gpu else "gloo"


def start(device: str, patience: float = 0.0, offload: bool = False) -> Ranks:
    """Joins the processes that torchrun started, if it started several.

    Args:
        offload: shares of networks lie in main memory.
        patience: seconds that a process may wait for something else, a scorer, while the others wait for it.
    Raises:
        BadInput: a GPU is asked for and there is none, or the environment is not as torchrun makes it.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise BadInput("run.device", device, "no GPU is visible to torch; use run.device=cpu")
    use_gpu = device != "cpu" and torch.cuda.is_available()
    own = read_place()
    size, rank = own.size, own.rank
    place = torch.device("cuda", own.local) if use_gpu else torch.device("cpu")
    if use_gpu:
        torch.cuda.set_device(place)
    if size > 1 and not dist.is_initialized():
        dist.init_process_group(backend_of(use_gpu, offload), timeout=timedelta(seconds=patience + MARGIN))
    return Ranks(rank, size, place, patience=patience + MARGIN)


def describe_loss(error: RuntimeError) -> str | None:
    """One line about a meeting of processes that failed: which one noticed, in which phase; None of other errors."""
    words = " ".join(str(error).split())
    if not (dist.is_initialized() and (isinstance(error, dist.DistError) or any(sign in words for sign in SIGNS))):
        return None
    return (f"process {dist.get_rank()} of {dist.get_world_size()}, in {PhaseClock.phase}: the others did not answer "
            f"({words[:160]}); go on with run.resume=true")  # fmt: skip


def stop() -> None:
    """Leaves the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


SIGNS = ("gloo", "Gloo", "Connection closed by peer", "Connection reset by peer", "NCCL")
"""words of errors of collectives"""

BUCKET = 256 * 2**20
"""bytes of gradients that ranks average at a time"""

MARGIN = 1800.0
"""seconds that ranks wait for one another at least (compilation, an evaluation), beyond what they wait for scorers"""
