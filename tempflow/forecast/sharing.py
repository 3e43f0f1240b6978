"""What a process holds of a network that is shared out, and what a call gathers of it."""

from __future__ import annotations

from dataclasses import dataclass

from tempflow.common.precision import DTYPES
from tempflow.models.without_weights.skeleton import Skeleton
from tempflow.settings.checks import shard_count
from tempflow.settings.fields import Config

AHEAD = 2
"""blocks that are gathered at a time: the one that computes and the next"""


@dataclass(frozen=True)
class Sharing:
    """Bytes of one process.

    Example: FLUX.1-dev, everything trained, 8 shares: 5.5 GiB of fp32 weights; a call gathers 1.5 GiB in bf16.
    """

    shares: int
    offload: bool
    copy: str
    """the tails' copy: whole, sharded, or of the adapted layers alone where nothing is shared out"""
    gathered: int
    """two blocks, and what is around the blocks, as long as a call lasts"""
    reduced: int
    """gradients of two blocks in the precision of the call, and in fp32 for their mean"""

    @property
    def shared(self) -> bool:
        return self.copy != "own"

    @property
    def whole_tails(self) -> bool:
        """Tails call a network that every process holds."""
        return self.copy in ("own", "whole")

    def of(self, size: int) -> int:
        """What of `size` bytes stays on the GPU of one process."""
        return 0 if self.offload else -(-size // self.shares)

    def merged(self, skeleton: Skeleton, itemsize: int) -> int:
        """The tails' copy: once weights are in shares, it can share none with them."""
        if self.copy in ("own", "none"):
            return skeleton.parts["merged"].bytes if self.copy == "own" else 0
        adapters = 0 if _trains_all(skeleton) else skeleton.parts["trainable"].parameters
        size = (skeleton.parts["transformer"].parameters - adapters) * itemsize
        return size if self.copy == "whole" else self.of(size)


def read_sharing(config: Config, skeleton: Skeleton, ranks: int) -> Sharing:
    """
    Raises:
        BadInput: as `shard_count`.
    """
    shares, parallel = shard_count(config.parallel, ranks), config.parallel
    if parallel.shard == "none":
        return Sharing(1, False, "own", 0, 0)
    itemsize = DTYPES[config.model.dtype].itemsize
    *blocks, (around, _) = skeleton.groups
    most, trained = max(total for total, _ in blocks), max(learnt for _, learnt in blocks)
    return Sharing(shares, parallel.offload, parallel.merged if config.tails.merged else "none",
                   itemsize * (around + AHEAD * most), AHEAD * trained * (itemsize + 4))  # fmt: skip


def _trains_all(skeleton: Skeleton) -> bool:
    return skeleton.parts["trainable"].parameters == skeleton.parts["transformer"].parameters
