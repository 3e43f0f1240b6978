"""Arithmetic across settings, checked before anything is loaded."""

from __future__ import annotations

import os

from tempflow.common.errors import BadInput
from tempflow.settings.fields import Config, RewardConfig
from tempflow.settings.spread import ParallelConfig

NODE = 8
"""processes of a node where torchrun does not tell"""


def group_size(config: Config) -> int:
    """Branches whose rewards are compared with one another."""
    explore = config.explore
    trunks = {"seed": 1, "prompt": explore.noises, "batch": explore.noises * explore.prompts}[config.credit.group]
    return explore.siblings * trunks


def longest_wait(reward: RewardConfig) -> float:
    """Seconds until a process gives its scorer servers up: a first attempt, then the patience."""
    return reward.timeout + reward.patience


def check_consistency(config: Config, ranks: int) -> None:
    """Settings that cannot work together.

    Raises:
        BadInput: branches that cannot be compared, batches that would be cut unevenly, steps that would be mixed.
    """
    _check_groups(config)
    _check_batches(config, ranks)
    _check_weights(config)
    if isinstance(config.explore.window, int) and config.explore.window >= config.sample.steps:
        hint = f"a window must leave a step for the tail; sample.steps={config.sample.steps}"
        raise BadInput("explore.window", config.explore.window, hint)
    if config.objective.kl_divisor == "diffusion" and config.sample.transition == "cps":
        hint = "cps has no diffusion coefficient; use objective.kl_divisor=std"
        raise BadInput("objective.kl_divisor", "diffusion", hint)


def _check_weights(config: Config) -> None:
    """Weights with which there is something to learn."""
    name, learn = config.reward.name, config.learn
    if isinstance(name, dict) and not any(name.values()):
        raise BadInput("reward.name", name, "all weights are 0, so nothing is optimised; give one another weight")
    if learn.lr * learn.weight_decay >= 1:
        hint = f"times learn.lr={learn.lr} it takes each step all of a parameter, or more; 0.01 is usual"
        raise BadInput("learn.weight_decay", learn.weight_decay, hint)


def _check_groups(config: Config) -> None:
    explore, credit = config.explore, config.credit
    if group_size(config) < 2:
        name = "siblings" if credit.group == "seed" or explore.noises > 1 else "noises"
        hint = (f"a {credit.group} group would hold one branch and compare it with nothing; "
                f"give at least 2, or a wider credit.group")  # fmt: skip
        raise BadInput(f"explore.{name}", getattr(explore, name), hint)
    mixing = "credit.group" if credit.group == "batch" else "credit.std" if credit.std == "global" else None
    if explore.draw == "prompt" and mixing:
        value = {"credit.group": credit.group, "credit.std": credit.std}[mixing]
        raise BadInput(mixing, value, "explore.draw=prompt gives prompts forks of their own, and this would mix them")


def _check_batches(config: Config, ranks: int) -> None:
    explore, learn = config.explore, config.learn
    if explore.prompts % ranks:
        raise BadInput("explore.prompts", explore.prompts, f"must be a multiple of the {ranks} processes")
    trunks = explore.prompts * explore.noises // ranks
    if trunks % learn.rows:
        hint = f"must divide the {trunks} trunks of a process (prompts x noises / processes), or a batch would be cut"
        raise BadInput("learn.rows", learn.rows, hint)
    batches = trunks // learn.rows
    if batches % learn.updates:
        hint = f"must divide the {batches} batches (trunks / learn.rows): an update takes whole forks with all siblings"
        raise BadInput("learn.updates", learn.updates, hint)


def shard_count(parallel: ParallelConfig, ranks: int) -> int:
    """Shares that a network is cut into.

    Raises:
        BadInput: nodes that do not fit evenly into the processes.
    """
    if parallel.shard == "none":
        return 1
    if parallel.shard == "full":
        return ranks
    node = parallel.per_node or int(os.environ.get("LOCAL_WORLD_SIZE", min(NODE, ranks)))
    if ranks % node:
        raise BadInput("parallel.per_node", node, f"must divide the {ranks} processes")
    return node
