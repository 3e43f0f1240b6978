"""Several scorers: those whose weighted combination is optimised, and the gold panel that is only watched."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from tempflow.common.errors import BadInput
from tempflow.common.say import say
from tempflow.prompts import Prompt
from tempflow.rewards.scorer import Scorer, check_options, load_scorer
from tempflow.rewards.servers.secret import read_token
from tempflow.settings.fields import RewardConfig

LOCAL = threading.Lock()
"""Scorers that compute here work one at a time, however many threads wait for other machines."""


@dataclass(frozen=True)
class Panel:
    """M scorers under short names, and the weight of each."""

    scorers: Mapping[str, Scorer]
    weights: Tensor
    """(M,) fp32"""
    parallel: int = field(init=False)
    """calls that may wait for other machines at once"""

    def __post_init__(self) -> None:
        object.__setattr__(self, "parallel", max((s.parallel for s in self.scorers.values()), default=0))

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """(B, 3, H, W) uint8 images and B prompts -> (M, B) fp32; NaN where a scorer has no opinion."""
        rewards = torch.empty(len(self.scorers), len(images))
        for row, scorer in zip(rewards, self.scorers.values(), strict=True):
            with nullcontext() if scorer.parallel else LOCAL:
                row[:] = scorer(images, prompts)
        return rewards

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Refuses prompts that a scorer here cannot judge; servers refuse them when they are asked to.

        Raises:
            BadInput: naming the scorer and the prompt.
        """
        for scorer in self.scorers.values():
            scorer.check(prompts)

    def total(self, rewards: Tensor) -> Tensor:
        """(M, ...) rewards -> (...) their weighted sum; NaN where one is missing."""
        return (self.weights.view(-1, *[1] * (rewards.dim() - 1)) * rewards).sum(0)

    def describe(self, word: str) -> str:
        """One line: which scorers, with which weights, and where they compute."""
        scorers = zip(self.scorers.values(), self.weights.tolist(), strict=True)
        parts = [
            (f"{weight:g} x " if weight else "") + scorer.name + (" on servers" if scorer.parallel else "")
            for scorer, weight in scorers
        ]
        return f"{word}: {', '.join(parts) or 'none'}"

    def check_opinions(self, rewards: Tensor) -> None:
        """Refuses (M, ...) rewards that hold not one number of some scorer.

        Raises:
            BadInput: naming the scorer.
        """
        for row, scorer in zip(rewards, self.scorers.values(), strict=True):
            if row.isnan().all():
                hint = f"returned NaN for all {row.numel()} images; a reward of some of them must be a number"
                raise BadInput(scorer.setting, scorer.name, hint)


def load_panels(config: RewardConfig, rows: int, device: torch.device) -> tuple[Panel, Panel]:
    """The rewards and the gold panel: on servers where these serve them, else here.

    Args:
        rows: images a local scorer gets in one call, and a request carries unless reward.batch says otherwise.
        device: where local scorers compute.
    Raises:
        BadInput: no such scorer, wrong options, servers that refuse, answer nothing or serve none of the rewards.
    """
    weights = config.name if isinstance(config.name, dict) else {config.name: 1.0}
    golds = [config.gold] if isinstance(config.gold, str) else list(config.gold or ())
    check_options(config.options, (*weights, *golds))
    remote = _servers(config, rows, list(weights)) if config.servers else {}

    def load(setting: str, name: str) -> Scorer:
        if name not in remote:
            return load_scorer(setting, name, rows, config.options.get(name), device)
        if name in config.options:
            hint = "this scorer runs on a server; give its options there, by --option"
            raise BadInput(f"reward.options.{name}", config.options[name], hint)
        return Scorer(setting, name, remote[name], sys.maxsize, config.requests)

    def panel(setting: str, names: Sequence[str], factors: Iterable[float]) -> Panel:
        scorers = {label: load(setting, name) for label, name in labels(setting, names).items()}
        return Panel(scorers, torch.tensor(list(factors), dtype=torch.float32))

    return panel("reward.name", list(weights), weights.values()), panel("reward.gold", golds, [0.0] * len(golds))


def labels(setting: str, names: Sequence[str]) -> dict[str, str]:
    """Short name -> name: `score` for `module:score`, unless another one is called so, too.

    Raises:
        BadInput: the same scorer twice.
    """
    if len(set(names)) < len(names):
        raise BadInput(setting, list(names), "names a scorer twice")
    short = [name.rpartition(":")[2] for name in names]
    return {part if short.count(part) == 1 else name: name for part, name in zip(short, names, strict=True)}


def _servers(config: RewardConfig, rows: int, rewards: Sequence[str]) -> dict[str, Callable[..., Tensor]]:
    """What the servers serve: name -> scoring function."""
    from tempflow.rewards.servers.fleet import Fleet, Terms  # needs a package that scoring here does not

    token = read_token("reward.token_file", config.token_file)
    terms = Terms(config.requests, config.timeout, config.patience)
    fleet = Fleet(config.servers, terms, token)
    say(f"asking {', '.join(config.servers)} what they serve")
    served = fleet.survey()
    for server in fleet.servers:
        if not server.well:
            say(f"going on without {server.url} for now ({server.fault})")
    if not served & set(rewards):
        hint = f"serve {', '.join(sorted(served))}, not {', '.join(rewards)}; serve the reward, or remove the servers"
        raise BadInput("reward.servers", config.servers, hint)
    batch = config.batch or rows
    return {name: partial(fleet.score, name, batch=batch) for name in served}
