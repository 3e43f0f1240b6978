"""One architecture on one device: policies, scorers and runs for the variants of `compare.py`, and timed iterations.

Runs are real, set up and stepped as `tempflow.train` does it; variants with the same weights share the policy. Every
timed iteration starts from the same parameters and a fresh optimizer, so rewards can be compared branch by branch.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import io
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tempflow_kernels
import torch
from machine.flops import synchronise
from machine.memory_peak import MemoryPeak, free_cached_blocks
from rollouts.architectures import (
    ARCHITECTURES,
    COMMON,
    Architecture,
    make_light_decoder,
    make_pipeline,
    random_texts,
)
from rollouts.clip_scorer import CLIP_H, SMALL_CLIP, ByImages, ByTensor, make_clip
from rollouts.official import official_step
from rollouts.variants import Variant, settings_of
from rollouts.watched import Counting, Recording
from torch import Tensor

from tempflow.digits.scorers import DigitsReward
from tempflow.models.load import load_policy
from tempflow.policy import Policy
from tempflow.rewards.panel import Panel
from tempflow.rewards.scorer import Scorer
from tempflow.run.assembly import set_up
from tempflow.run.noise_mode import choose_mode
from tempflow.run.trainer import Trainer
from tempflow.settings.fields import Config
from tempflow.settings.reading import read_values, validate
from tempflow.train import train_step

DIGITS = {"explore.prompts": 2, "tails.rows": 48, "reward.rows": 48, "learn.rows": 4, "eval.prompts": 1}
COPIES = 4.5
"""Memory of the device over that of a transformer, from which on several policies are kept at a time."""
DISTURBANCE = 0.02
"""size of the normal noise on adapters, so that they do something"""


@dataclass
class Case:
    """A variant ready to run."""

    variant: Variant
    trainer: Trainer
    judge: Callable | None
    """scorer of PIL images, for the released algorithm"""
    start: dict[str, Tensor]
    """trained parameters that every iteration starts from"""
    decoder: Callable | None
    """torch's compiled call of the image decoder, which variants share, where this variant compiles it"""
    copies: int | None = None
    """rows of a training micro-batch of the released algorithm"""

    @property
    def rollouts(self) -> int:
        """Branches of an iteration."""
        return self.trainer.method.branches(self.trainer.config.explore.prompts)


@dataclass(frozen=True)
class Iteration:
    """What one timed iteration gave."""

    seconds: float
    cpu_seconds: float
    """of all threads of this process"""
    phases: dict[str, float]
    rewards: Tensor
    """(S, R, K)"""
    grad_norm: float
    gib: float | None
    """memory above what was held before it began"""
    tail_rows: int | None
    """network rows of tails that were computed, padding included; None for the released algorithm"""


class Bench:
    """Makes cases. `overrides` are `section.field` -> value on top of the architecture's settings."""

    def __init__(self, name: str, device: torch.device, workshop: Path, overrides: dict[str, Any]):
        self.name, self.device, self.workshop, self.overrides = name, device, workshop, overrides
        self.on_gpu = device.type == "cuda"
        self.architecture: Architecture | None = ARCHITECTURES.get(name)
        self.policies: dict[str, Policy] = {}
        self.starts: dict[str, dict[str, Tensor]] = {}
        self.clips: dict[torch.dtype, torch.nn.Module] = {}
        self.runs = 0
        if self.architecture:
            dtype = "bf16" if self.on_gpu else "fp32"
            make_pipeline(self.architecture, workshop / "pipeline", device, dtype)
            (workshop / "prompts.txt").write_text("\n".join(f"prompt number {index}" for index in range(64)))

    def config(self, variant: Variant) -> Config:
        """The configuration of a variant."""
        settings = {"run.dir": str(self.workshop / f"run{self.runs}"), "run.device": self.device.type,
                    "prompts.test": None, "run.trackers": []}  # fmt: skip
        if self.architecture:
            side = self.architecture.pixels
            settings |= COMMON | self.architecture.settings
            settings |= {"sample.height": side, "sample.width": side, "model.path": str(self.workshop / "pipeline"),
                         "prompts.train": str(self.workshop / "prompts.txt")}  # fmt: skip
        else:
            settings |= COMMON | DIGITS
        settings |= settings_of(variant, self.on_gpu)
        if self.architecture and variant.name == "official" and self.on_gpu:
            settings["model.dtype"] = self.architecture.official_weights
        values = {} if self.architecture else read_values("digits")
        for name, value in (settings | self.overrides).items():
            part, _, field = name.partition(".")
            made = value.format(workshop=self.workshop) if isinstance(value, str) else value
            values.setdefault(part, {})[field] = made
        return validate(values)

    def case(self, variant: Variant) -> Case:
        """The variant, set up; its policy is shared with variants of the same `model` settings."""
        config = self.config(variant)
        self.runs += 1
        policy = self.policy(config)
        make_light_decoder(policy.pipeline.vae.config, self.workshop / "light_decoder")
        function, judge = self.scorers(variant)
        reward = Panel({self.name: Scorer("reward.name", self.name, function, config.reward.rows)}, torch.ones(1))
        with contextlib.redirect_stderr(io.StringIO()):
            trainer, _, _ = set_up(config, policy, (reward, Panel({}, torch.ones(0))))
        counting = tuple(Counting(engine) for engine in trainer.tails)
        trainer = replace(trainer, scores=Recording(trainer.scores), tails=counting)
        decoder = policy.pipeline.vae.decoder._compiled_call_impl if config.tails.compile_vae else None
        judge = judge if variant.official else None
        copies = trainer.method.siblings if judge else None
        return Case(variant, trainer, judge, self.starts[repr(config.model)], decoder, copies)

    def policy(self, config: Config) -> Policy:
        """The policy of a configuration's `model` section; in fp8 it has a merged copy of its own."""
        key = repr(config.model)
        if key not in self.policies:
            with self.texts():
                policy = load_policy(config.model, config.sample, self.device, True, config.learn.rows)
            if self.on_gpu and config.model.dtype == "fp32":
                policy.network.dtype = torch.bfloat16  # fp32 weights in a 16-bit autocast, as the released code
                policy.prepare_decoder = lambda compiled: None  # torch's own memory layout, as the released code
            self._same_adapters(policy)
            self.policies[key] = policy
            self.starts[key] = {name: value.detach().clone() for name, value in policy.trainable().items()}
        return self._twin(key) if config.tails.fp8 else self.policies[key]

    def _twin(self, key: str) -> Policy:
        """A policy of the same weights whose merged copy is another one."""
        if f"{key} fp8" not in self.policies:
            twin = copy.copy(self.policies[key])
            twin.network = copy.copy(twin.network)
            twin.network._merged = None
            twin.quantise_merged()
            twin.quantise_merged = lambda: "in fp8 already"
            self.policies[f"{key} fp8"] = twin
        return self.policies[f"{key} fp8"]

    def has_room(self, policy: Policy) -> bool:
        """Whether further copies of a transformer of that size fit on the device beside it, and work with them."""
        held = sum(parameter.nbytes for parameter in policy.pipeline.transformer.parameters())
        return not self.on_gpu or torch.cuda.mem_get_info(self.device)[1] > COPIES * held

    def forget(self, policy: Policy) -> None:
        """Lets go of a policy."""
        for key in [key for key, known in self.policies.items() if known is policy]:
            del self.policies[key], self.starts[key]

    @torch.no_grad()
    def _same_adapters(self, policy: Policy) -> None:
        """Adapters that do something, the same in every policy."""
        generator = torch.Generator().manual_seed(2)
        for parameter in policy.trainable().values():
            noise = torch.randn(parameter.shape, generator=generator) * DISTURBANCE
            parameter.copy_(noise)

    @contextlib.contextmanager
    def texts(self) -> Iterator[None]:
        """Random embeddings where there is no text encoder."""
        with random_texts(self.architecture) if self.architecture else contextlib.nullcontext():
            yield

    def scorers(self, variant: Variant) -> tuple[Callable, Callable]:
        """The reward from tensors, and from PIL images."""
        if not self.architecture:
            digits = DigitsReward()
            return digits, lambda images, prompts: digits(bytes_of(images), prompts)
        plain = not self.on_gpu or variant.name == "official"
        model = self.clip(torch.float32 if plain else torch.bfloat16)
        return ByTensor(model), ByImages(model)

    def clip(self, dtype: torch.dtype) -> torch.nn.Module:
        if dtype not in self.clips:
            config = SMALL_CLIP if self.name.startswith("small") else CLIP_H
            self.clips[dtype] = make_clip(config, self.device, dtype)
        return self.clips[dtype]

    def row_tokens(self) -> tuple[int, int]:
        """Image and text tokens of a network row."""
        if self.architecture:
            return self.architecture.image_tokens, self.architecture.text_tokens
        transformer = next(iter(self.policies.values())).pipeline.transformer.config
        return (transformer.sample_size // transformer.patch_size) ** 2, 77 + 16


def bytes_of(images: list) -> Tensor:
    """PIL images back to (B, 3, H, W) uint8."""
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2).contiguous()


def iterate(case: Case, iteration: int) -> Iteration:
    """One timed iteration from the case's starting point."""
    trainer, device = case.trainer, case.trainer.policy.device
    _reset(case)
    before = sum(engine.total for engine in trainer.tails)
    trainer.clock.read()
    peak = MemoryPeak(device)
    synchronise(device)
    began, began_cpu = time.perf_counter(), time.process_time()
    if case.judge:
        rewards, judged, grad_norm = official_step(trainer, iteration, case.judge, case.copies)
    else:
        grad_norm = train_step(trainer, iteration).grad_norm
        rewards = trainer.scores.rewards.view(trainer.method.rule.forks.take, -1, trainer.method.siblings)
    synchronise(device)
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - began_cpu
    phases = trainer.clock.read()
    if case.judge:
        phases["reward"] = round(judged, 4)
    rows = None if case.judge else sum(engine.total for engine in trainer.tails) - before
    return Iteration(seconds, cpu_seconds, phases, rewards.cpu(), grad_norm, peak.gib(), rows)


@torch.no_grad()
def _reset(case: Case) -> None:
    """Parameters and optimizer as at the start."""
    gc.collect()
    free_cached_blocks(case.trainer.policy.device)  # those of other variants' streams: cudaMalloc would wait for them
    noise = choose_mode(case.trainer.config.run.noise, None, case.trainer.policy.device)
    tempflow_kernels.use_noise(noise)  # another variant may have changed it
    for name, parameter in case.trainer.policy.trainable().items():
        parameter.copy_(case.start[name])
        parameter.grad = None
    case.trainer.stepper.optimizer.state.clear()
    case.trainer.policy.pipeline.vae.decoder._compiled_call_impl = case.decoder


def warm_up(case: Case) -> float:
    """Seconds of an iteration that forks at the last steps alone: all shapes of a full one, few network rows."""
    trainer, method, forks = case.trainer, case.trainer.method, case.trainer.method.rule.forks
    branches = trainer.config.explore.prompts * method.noises * method.siblings
    last = forks.pool[-forks_to_warm_up(branches, trainer.tails[0].rows, len(forks.pool)) :]
    rule = replace(method.rule, forks=replace(forks, pool=last, take=len(last)))
    return iterate(replace(case, trainer=replace(trainer, method=replace(method, rule=rule))), 0).seconds


def forks_to_warm_up(branches: int, rows: int, forks: int) -> int:
    """The fewest forks, of `branches` each, that make a full chunk of `rows` and a rest as all forks do."""
    total = branches * forks
    fitting = [count for count in range(1, forks) if branches * count % rows == total % rows
               and branches * count >= min(rows, total)]  # fmt: skip
    return min(fitting, default=forks)
