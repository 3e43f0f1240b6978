"""What each process holds of the networks, and what of the settings cannot be had then."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch

from tempflow.common.errors import BadInput
from tempflow.common.precision import DTYPES
from tempflow.common.say import say
from tempflow.explore.tails.engine import EagerEngine
from tempflow.explore.tails.levels import Engines
from tempflow.forecast.words import Forecast
from tempflow.learn.optimizers import OPTIMIZERS
from tempflow.parallel.ranks import Ranks
from tempflow.parallel.shards import Shards, make_shards
from tempflow.policy import Policy
from tempflow.settings.checks import shard_count
from tempflow.settings.fields import Config

CARD = 79 * 2**30
"""bytes of a card of 80 GB"""


@dataclass(frozen=True)
class Spreading:
    """The processes of a run whose networks are shared out, or of one where they are not."""

    ranks: Ranks
    shards: Shards | None

    def engines(self, engines: Engines, policy: Policy) -> Engines:
        """Evaluation calls the trained network: where that is shared out, plainly."""
        if self.shards is None:
            return engines
        return replace(engines, evaluate=EagerEngine(policy, engines.explore[0].rows, numerics=nullcontext))


def check_spreading(config: Config) -> None:
    """
    Raises:
        BadInput: a setting that does not go with a network that is shared out.
    """
    if config.parallel.shard == "none":
        if config.parallel.offload:
            raise BadInput("parallel.offload", True, "only shares move to main memory; use parallel.shard=full")
        return
    refused = [
        ("learn.optimizer", config.learn.optimizer, OPTIMIZERS[config.learn.optimizer].module != "torch.optim",
         "bitsandbytes knows no shares; use adamw, of which each process holds its share"),
        ("learn.compile", True, config.learn.compile, "blocks that are gathered for each call are not compiled"),
        ("explore.draw", "prompt", config.explore.draw == "prompt",
         "processes would follow trunks of different lengths, and network calls are made together; use iteration"),
    ]  # fmt: skip
    for field, value, wrong, why in refused:
        if wrong:
            raise BadInput(field, value, f"not with parallel.shard={config.parallel.shard}: {why}")


def check_sharded_tails(config: Config) -> None:
    """
    Raises:
        BadInput: a setting of tails that needs a whole network in each process.
    """
    tails = config.tails
    refused = [("fp8", True, tails.fp8), ("level", tails.level, tails.level not in ("auto", "eager")),
               ("rows", "auto", tails.rows == "auto")]  # fmt: skip
    for name, value, wrong in refused:
        if wrong:
            hint = "needs a whole network in each process; use tails.merged=true and parallel.merged=whole"
            raise BadInput(f"tails.{name}", value, hint if name != "rows" else f"{hint}, or give a number")


def settle_copy(forecast: Forecast, gpu_bytes: float) -> Config:
    """The settings with the tails' copy whole or shared out, as the memory plan allows, and tails called accordingly.

    Args:
        gpu_bytes: of the smallest GPU.
    Raises:
        BadInput: as `check_spreading` and `check_sharded_tails`.
    """
    config = forecast.config
    check_spreading(config)
    if config.parallel.shard == "none":
        return config
    if config.parallel.merged == "auto":
        whole = _with_copy(config, "whole")
        fits = not config.tails.merged or replace(forecast, config=whole).memory() <= gpu_bytes
        config = whole if fits else _with_copy(config, "sharded")
    if config.tails.merged and config.parallel.merged == "whole":
        return config
    check_sharded_tails(config)
    return replace(config, tails=replace(config.tails, level="eager"))


def _with_copy(config: Config, copy: str) -> Config:
    return replace(config, parallel=replace(config.parallel, merged=copy))


def gpu_bytes(config: Config, ranks: Ranks, planned: bool) -> float:
    """Memory of the smallest GPU; without one that of a card of 80 GB for a plan, and no limit for a run."""
    if config.parallel.gpu_gib is not None:
        return config.parallel.gpu_gib * 2**30
    if ranks.device.type != "cuda":
        return CARD if planned else float("inf")
    total = torch.cuda.get_device_properties(ranks.device).total_memory
    return float(ranks.gather(torch.tensor([total]), 0).min())


def spread_out(config: Config, ranks: Ranks) -> Spreading:
    """Processes of settled settings, in the groups that share a network out."""
    if config.parallel.shard == "none":
        return Spreading(ranks, None)
    merged = config.parallel.merged if config.tails.merged else None
    count, dtype = shard_count(config.parallel, ranks.size), DTYPES[config.model.dtype]
    shards = make_shards(ranks, count, config.parallel.offload, dtype, merged)
    say(f"the network lies in {shards.mesh.size(-1)} shares{', in main memory' if shards.offload else ''}; the tails' "
        f"copy: {merged or 'none'}")  # fmt: skip
    return Spreading(replace(ranks, in_step=True), shards)
