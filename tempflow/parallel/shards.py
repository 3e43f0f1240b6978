"""Networks shared out over processes by torch's own engine (FSDP2), from outside: no step of training knows of it.

Each block of a transformer, then what is left around them, is a group whose parameters lie in equal shares (DTensors)
and are gathered for the time of a call; gradients are reduced into shares and averaged on the way back. A call is then
one of all processes: every process has to make the same calls (`Ranks.in_step`).

`put` and `like` turn full tensors into shares, `tempflow.common.tensors.gather` turns them back: what is saved knows no
number of processes.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from tempflow.common.tensors import repeated_blocks
from tempflow.parallel.ranks import Ranks, backend_of


@dataclass(frozen=True)
class Shards:
    """How networks are shared out.

    Example: hybrid on 16 processes, 8 a node: a mesh of (2, 8); each parameter lies in 8 shares, twice.
    """

    mesh: DeviceMesh
    offload: bool
    """shares stay in main memory"""
    device: torch.device
    """where calls are computed"""
    dtype: torch.dtype
    """in which parameters are gathered; gradients are averaged in fp32"""
    merged: str | None
    """the tails' copy: whole in each process, sharded, or none"""

    def apply(self, module: nn.Module, widen: bool = False) -> None:
        """Shares `module` out, block by block, so that no GPU holds more than its share and one block meanwhile.

        Args:
            module: on the CPU, or on this process's device.
            widen: whether its parameters are to be kept in fp32.
        """
        # Nothing here writes into what a block or a network returns.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        pinned = self.device.type == "cuda"
        offload = CPUOffloadPolicy(pin_memory=pinned) if self.offload else OffloadPolicy()
        for part in (*repeated_blocks(module), module):
            if widen:
                _widen(part)
            fully_shard(part, mesh=self.mesh, reshard_after_forward=True, mp_policy=self._precision(),
                        offload_policy=offload)  # fmt: skip

    def _precision(self) -> MixedPrecisionPolicy:
        if self.dtype == torch.float32:
            return MixedPrecisionPolicy(cast_forward_inputs=False)
        return MixedPrecisionPolicy(self.dtype, torch.float32, cast_forward_inputs=False)


@torch.no_grad()
def _widen(part: nn.Module) -> None:
    for tensor in (*part.parameters(), *part.buffers()):
        if not isinstance(tensor, DTensor) and tensor.is_floating_point():
            tensor.data = tensor.data.float()


def make_shards(ranks: Ranks, count: int, offload: bool, dtype: torch.dtype, merged: str | None) -> Shards:
    """The mesh of all processes, `count` of which hold one network; one process alone makes a group of itself."""
    if not dist.is_initialized():
        backend = backend_of(ranks.device.type == "cuda", offload)
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    kind, table = ranks.device.type, torch.arange(ranks.size).view(-1, count)
    if count == ranks.size:
        mesh = DeviceMesh.from_group(dist.group.WORLD, kind, mesh_dim_names=("shard",))
    else:
        groups = [_own_group(rows.tolist(), ranks.patience) for rows in (table.T, table)]
        mesh = DeviceMesh.from_group(groups, kind, table, mesh_dim_names=("replicate", "shard"))
    return Shards(mesh, offload, ranks.device, dtype, merged)


def _own_group(members: list[list[int]], patience: float) -> dist.ProcessGroup:
    """This process's group of several that partition all; it waits as long as the group of all does."""
    own, _ = dist.new_subgroups_by_enumeration(members, timeout=timedelta(seconds=patience))
    return own


@torch.no_grad()
def put(target: Tensor, source: Tensor) -> None:
    """Copies a full tensor, the same in all processes, into a tensor that may be shared out; nobody waits."""
    if isinstance(target, DTensor):
        mine = distribute_tensor(source, target.device_mesh, target.placements, src_data_rank=None)
        target.to_local().copy_(mine.to_local())
    else:
        target.copy_(source)


def like(parameter: Tensor, value: Tensor) -> Tensor:
    """A full tensor shared out as `parameter` is, if that is and has its shape; else itself."""
    if not isinstance(parameter, DTensor) or value.shape != parameter.shape:
        return value
    fresh = torch.empty_like(parameter, dtype=value.dtype)
    put(fresh, value)
    return fresh
