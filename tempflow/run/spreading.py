"""What each process holds of the networks, and what of the settings cannot be had then."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace

from tempflow.common.errors import BadInput
from tempflow.common.precision import DTYPES
from tempflow.common.say import say
from tempflow.explore.tails.engine import EagerEngine
from tempflow.explore.tails.levels import Engines
from tempflow.learn.optimizers import OPTIMIZERS
from tempflow.parallel.ranks import Ranks
from tempflow.parallel.shards import Shards, make_shards
from tempflow.policy import Policy
from tempflow.settings.fields import Config


@dataclass(frozen=True)
class Spreading:
    """Settings and processes of a run whose networks are shared out, or of one where they are not."""

    config: Config
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


def spread_out(config: Config, ranks: Ranks) -> Spreading:
    """Settles what is whole and what is shared out, the same in all processes, and makes their groups.

    Raises:
        BadInput: as `check_spreading` and `check_sharded_tails`.
    """
    check_spreading(config)
    if config.parallel.shard == "none":
        return Spreading(config, ranks, None)
    merged = config.parallel.merged if config.tails.merged else None
    if merged == "auto":
        merged = "whole"
    if merged != "whole":
        check_sharded_tails(config)
        config = replace(config, tails=replace(config.tails, level="eager"))
    shards = make_shards(config.parallel, ranks, DTYPES[config.model.dtype], merged)
    say(f"the network lies in {shards.mesh.size(-1)} shares{', in main memory' if shards.offload else ''}; the tails' "
        f"copy: {merged or 'none'}")  # fmt: skip
    return Spreading(config, replace(ranks, in_step=True), shards)
