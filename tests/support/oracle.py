"""The whole training step for one image after the other, in float64, written from the papers. Knows no tempflow.

Given are: the schedule, the noise by its keys, the prompts, where their trunks fork, and the scorers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import oracle_formulas as formulas
import torch
from oracle_formulas import Move
from tempflow_kernels import fold_key, normal_like
from torch import Tensor

Parameters = dict[str, Tensor]
Velocity = Callable[[Parameters, Tensor, float, str], Tensor]
"""(parameters, one latent, sigma, text) -> its velocity"""
Judge = Callable[[Tensor, str], float]


@dataclass(frozen=True)
class Facts:
    """What a method and its optimizer are."""

    sigmas: tuple[float, ...]
    kind: str = "flow_sde"
    level: float | tuple[float, ...] = 0.7
    noises: int = 1
    siblings: int = 1
    pool: tuple[int, ...] = (0,)
    """steps at which trunks may fork"""
    window: int = 1
    jumps: dict[int, int] = field(default_factory=dict)
    solver: str = "euler"
    strides: tuple[int, ...] = (1,)
    drop_below: float = 0.0
    group: str = "seed"
    std: str = "group"
    combine: str = "sum"
    limit: float = 5.0
    idle: str = "keep"
    weighting: str | Sequence[float] = "uniform"
    ratio: str = "gaussian"
    clip: float = 1e-4
    kl: float = 0.0
    kl_divisor: str = "std"
    updates: int = 1
    updates_by: str = "trunks"
    inner_epochs: int = 1
    lr: float = 3e-4
    linear_until: int | None = None
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 1e-4
    max_norm: float = 1.0
    ema_decay: float = 0.9
    ema_every: int = 1
    run_seed: int = 0
    processes: int = 1

    def target(self, step: int) -> int:
        return step + self.jumps.get(step, 1)

    def moves(self, fork: int) -> list[Move]:
        """The stochastic steps of a window that begins at `fork`."""
        moves, step = [], fork
        for _ in range(self.window):
            level = self.level[step] if isinstance(self.level, tuple) else self.level
            moves.append(Move(self.kind, level, self.sigmas, step, self.target(step)))
            step = self.target(step)
        return moves

    def weight(self, move: Move) -> float:
        """The weight of a step: mean 1 over all that are ever trained; a list stands as it is."""
        if not isinstance(self.weighting, str):
            return self.weighting[move.step]
        trained = {each.step: each for fork in self.pool for each in self.moves(fork)}
        scale = WEIGHTS[self.weighting]
        return scale(move) / (sum(scale(each) for each in trained.values()) / len(trained))


WEIGHTS: dict[str, Callable[[Move], float]] = {
    "uniform": lambda move: 1.0,
    "noise": lambda move: move.std,
    "inverse_step": lambda move: 1 / move.size,
    "inverse_sensitivity": lambda move: 1 / move.sensitivity(),
}


@dataclass
class Branch:
    """One trajectory: where it comes from, its stochastic steps, its images, what they earned."""

    fork: int
    """number of its fork, not the step"""
    prompt: int
    noise: int
    sibling: int
    text: str
    decisions: list[tuple[Move, Tensor, Tensor, Tensor]]
    """(move, state, state arrived at, mean of the sampling policy)"""
    images: list[Tensor]
    rewards: list[list[float]] = field(default_factory=list)
    """[tail][scorer]"""
    advantage: float = 0.0
    informative: bool = False


class Oracle:
    """A policy under training, from its first parameters on."""

    def __init__(self, facts: Facts, velocity: Velocity, first: Parameters, reference: Parameters):
        self.facts, self.velocity = facts, velocity
        self.parameters = {name: value.detach().double().clone() for name, value in first.items()}
        self.reference = {name: value.detach().double() for name, value in reference.items()}
        self.average = {name: value.clone() for name, value in self.parameters.items()}
        self.moments = {name: [torch.zeros_like(value), torch.zeros_like(value)] for name, value in first.items()}
        self.moments = {name: [m.double(), v.double()] for name, (m, v) in self.moments.items()}
        self.steps = 0
        self.log_ratios: list[tuple[float, float]] = []
        """(log-ratio, weight * advantage) of everything learnt from, for the tests to see what was clipped"""

    # ---- explore

    def noise(self, shape: torch.Size, iteration: int, slot: int, seed: int, moment: int, sibling: int) -> Tensor:
        """Moment 0 is where a trunk starts, moment i + 1 the noise of step i."""
        key = fold_key(fold_key(self.facts.run_seed, 0), iteration, slot, seed, moment)
        drawn = normal_like(torch.empty(1, *shape), torch.stack((key, torch.zeros_like(key)))[None], sibling + 1)
        return drawn[0, sibling].double()

    def sample(self, iteration: int, texts: Sequence[str], forks: Sequence[Sequence[int]], shape) -> list[Branch]:
        """All trajectories; `forks` are the steps at which the trunks of each prompt fork."""
        facts, branches = self.facts, []
        for prompt, text in enumerate(texts):
            for noise in range(facts.noises):
                for number, fork in enumerate(forks[prompt]):
                    state = self._trunk(self.noise(shape, iteration, prompt, noise, 0, 0), text, fork)
                    for sibling in range(facts.siblings):
                        draw = (iteration, prompt, noise, sibling)
                        decisions, images = self._branch(state, text, fork, draw)
                        branches.append(Branch(number, prompt, noise, sibling, text, decisions, images))
        return branches

    def _trunk(self, x: Tensor, text: str, fork: int) -> Tensor:
        sigmas = self.facts.sigmas
        for step in range(fork):
            x = x + (sigmas[step + 1] - sigmas[step]) * self.velocity(self.parameters, x, sigmas[step], text)
        return x

    def _branch(self, x: Tensor, text: str, fork: int, draw: tuple[int, int, int, int]):
        facts, decisions = self.facts, []
        iteration, prompt, noise, sibling = draw
        for move in facts.moves(fork):
            mean = move.mean(x, self.velocity(self.parameters, x, facts.sigmas[move.step], text))
            drawn = self.noise(x.shape, iteration, prompt, noise, move.step + 1, sibling)
            arrived = mean + move.std * drawn
            decisions.append((move, x, arrived, mean))
            x = arrived
        images = []
        for stride in facts.strides:
            path = formulas.visited(facts.sigmas, decisions[-1][0].target, stride, facts.drop_below)
            images.append(formulas.follow(facts.solver, path, x,
                                          lambda y, sigma: self.velocity(self.parameters, y, sigma, text)))  # fmt: skip
        return decisions, images

    # ---- credit

    def judge(self, branches: list[Branch], judges: Sequence[Judge], weights: Sequence[float]) -> None:
        """Rewards and advantages of all branches."""
        for branch in branches:
            branch.rewards = [[judge(image, branch.text) for judge in judges] for image in branch.images]
        for branch in branches:
            group = [other for other in branches if self._compared(branch, other)]
            everyone = [other for other in branches if other.fork == branch.fork]
            total = 0.0
            for read, factor in self._readings(weights):
                of_group, of_all = [read(other) for other in group], [read(other) for other in everyone]
                total += factor * formulas.advantage(read(branch), of_group, of_all, self.facts.std)
                branch.informative |= formulas.differs(of_group)
            branch.advantage = min(max(total, -self.facts.limit), self.facts.limit)

    def _compared(self, one: Branch, other: Branch) -> bool:
        if one.fork != other.fork:
            return False
        if self.facts.group == "batch":
            return True
        same_noise = self.facts.group == "prompt" or one.noise == other.noise
        return one.prompt == other.prompt and same_noise

    def _readings(self, weights: Sequence[float]) -> Iterator[tuple[Callable[[Branch], float], float]]:
        """What is normalised by itself: a function of a branch; and its factor."""
        for tail in range(len(self.facts.strides)):
            if self.facts.combine == "sum":
                yield lambda branch, tail=tail: _weighted(branch.rewards[tail], weights), 1.0
                continue
            for scorer, weight in enumerate(weights):
                yield lambda branch, tail=tail, scorer=scorer: branch.rewards[tail][scorer], weight

    # ---- learn

    def learn(self, iteration: int, branches: list[Branch]) -> list[Parameters | None]:
        """All optimizer steps of an iteration; the gradient of each before clipping, None where nothing was learnt."""
        facts = self.facts
        trunks = max(branch.prompt for branch in branches) * facts.noises + facts.noises
        per_process = trunks // facts.processes
        share = per_process // facts.updates
        gradients = []
        for _ in range(facts.inner_epochs):
            for first in range(0, per_process, share):
                places = [(b.prompt * facts.noises + b.noise) % per_process for b in branches]
                taken = [b for b, at in zip(branches, places, strict=True) if first <= at < first + share]
                for group in self._forks_of_a_step(taken):
                    gradients.append(self._update(group, iteration))
        return gradients

    def _forks_of_a_step(self, taken: list[Branch]) -> list[list[Branch]]:
        if self.facts.updates_by == "trunks":
            return [taken]
        return [[b for b in taken if b.fork == fork] for fork in sorted({b.fork for b in taken})]

    def _update(self, branches: list[Branch], iteration: int) -> Parameters | None:
        counted = [b for b in branches if b.informative or self.facts.idle == "keep"]
        learns = any(b.informative for b in counted) or (self.facts.kl > 0 and counted)
        if not learns:
            return None
        own = {name: value.clone().requires_grad_() for name, value in self.parameters.items()}
        losses = [self._loss(own, b, *decision) for b in counted for decision in b.decisions]
        gradient = dict(zip(own, torch.autograd.grad(sum(losses) / len(losses), list(own.values())), strict=True))
        self._adamw(gradient, iteration)
        return gradient

    def _loss(self, own: Parameters, branch: Branch, move: Move, x: Tensor, arrived: Tensor, old: Tensor) -> Tensor:
        """Of one stochastic step of one image."""
        facts, sigma = self.facts, self.facts.sigmas[move.step]
        new = move.mean(x, self.velocity(own, x, sigma, branch.text))
        log_ratio = formulas.log_ratio(facts.ratio, arrived, new, old, move.std)
        gain = facts.weight(move) * branch.advantage
        self.log_ratios.append((log_ratio.item(), gain))
        reference = move.mean(x, self.velocity(self.reference, x, sigma, branch.text))
        variance = move.std**2 if facts.kl_divisor == "std" else move.g**2
        kl = ((new - reference) ** 2).mean() / (2 * variance)
        return formulas.clipped_loss(gain, log_ratio, facts.clip) + facts.kl * kl

    def _adamw(self, gradient: Parameters, iteration: int) -> None:
        facts = self.facts
        self.steps += 1
        norm = math.sqrt(sum(float((value**2).sum()) for value in gradient.values()))
        scale = min(1.0, facts.max_norm / (norm + 1e-6))
        rate = facts.lr * (1 - iteration / facts.linear_until if facts.linear_until else 1.0)
        for name, value in gradient.items():
            first, second = self.moments[name]
            first.mul_(facts.betas[0]).add_((1 - facts.betas[0]) * scale * value)
            second.mul_(facts.betas[1]).add_((1 - facts.betas[1]) * (scale * value) ** 2)
            first_hat = first / (1 - facts.betas[0] ** self.steps)
            second_hat = second / (1 - facts.betas[1] ** self.steps)
            decayed = self.parameters[name] * (1 - rate * facts.weight_decay)
            self.parameters[name] = decayed - rate * first_hat / (second_hat.sqrt() + facts.eps)
        self._follow_average()

    def _follow_average(self) -> None:
        facts, done = self.facts, self.steps - 1
        if facts.ema_decay and self.steps % facts.ema_every:
            return
        decay = min((1 + done) / (10 + done), facts.ema_decay)
        for name, value in self.parameters.items():
            self.average[name] = decay * self.average[name] + (1 - decay) * value


def _weighted(rewards: Sequence[float], weights: Sequence[float]) -> float:
    return sum(weight * reward for weight, reward in zip(weights, rewards, strict=True) if weight)
