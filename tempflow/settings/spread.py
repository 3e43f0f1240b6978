"""Settings of several processes: what each of them holds of the model."""

from __future__ import annotations

from typing import Literal

from tempflow.settings.declare import Count, Positive, changeable, section


@section
class ParallelConfig:
    shard: Literal["none", "full", "hybrid"] = changeable("none")
    """Each process holds the whole network, its share of it (FSDP2), or its share within a node, the same in every
    node."""
    per_node: Count | None = changeable(None)
    """hybrid: processes that hold one network between them; null takes those of a node, as torchrun tells."""
    offload: bool = changeable(False)
    """Shares of parameters, gradients and optimizer stay in main memory while they are not used."""
    merged: Literal["auto", "whole", "sharded"] = changeable("auto")
    """The tails' copy of a shared-out network: whole in each process (graphs, fp8), or shared out as well; auto takes
    it whole where the memory plan fits."""
    gpu_gib: Positive | None = changeable(None)
    """GiB of a GPU that this plan has to fit into; null takes the GPU's own, without one 79 (a card of 80 GB)."""
    ranks: Count | None = changeable(None)
    """Processes that run.plan_only plans for; null takes those that are there."""
