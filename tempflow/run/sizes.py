"""What a run takes at a time: branches, latents to decode, noise of the loss; by its shapes and the memory there is."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tempflow.credit.decoding import FullCalls, even_rows
from tempflow.explore.schedule import NoiseSchedule
from tempflow.explore.tails.choose import measure_rows
from tempflow.explore.tails.chunks import free_memory, tail_lengths
from tempflow.explore.tails.levels import LEVELS, levels_of
from tempflow.explore.tails.solver import tail_solvers
from tempflow.forecast.words import Forecast
from tempflow.learn.noise import LossNoise, Shape, choose_noise
from tempflow.method import Method
from tempflow.models.load import load_skeleton
from tempflow.parallel.ranks import Ranks
from tempflow.policy import ImageDecoder, Policy
from tempflow.settings.fields import Config


def chunk_rows(
    config: Config, policy: Policy, method: Method, schedule: NoiseSchedule, ranks: Ranks, text: str, held_back: int
) -> int:
    """Branches that travel together where `tails.rows` is auto: measured, the same on every process."""
    branches = config.explore.prompts * config.explore.noises // ranks.size * config.explore.siblings
    solver = tail_solvers(config.tails)[0]
    lengths, unguided = tail_lengths(method.rule, branches, solver, schedule), solver.table(schedule).unguided[0]
    rows = measure_rows(config.tails, policy, lengths, text, held_back, unguided).rows
    return int(ranks.gather(torch.tensor([rows]), 0).min())


def memory_held_back(
    config: Config, policy: Policy, method: Method, schedule: NoiseSchedule, ranks: Ranks
) -> tuple[int, int]:
    """Bytes that chunks, and that noise stored for the loss, have to leave to the rest; 0 where memory is no limit."""
    if policy.device.type != "cuda":
        return 0, 0
    forecast = Forecast(config, load_skeleton(config.model, config.sample), method, schedule, ranks.size)
    captured = bool(LEVELS[levels_of(policy.device, config.tails)[0]].uncaptured)
    return forecast.beside_tails(captured), forecast.beside_tails(captured=True)


def loss_noise(config: Config, policy: Policy, ranks: Ranks, held_back: int) -> LossNoise:
    """Where the loss takes its noise from, in batches of this run's shape."""
    shape = Shape(config.learn.rows, config.explore.siblings, policy.latent_shape, config.objective.kl > 0)
    return choose_noise(config.learn.noise, shape, ranks, free_memory(policy.device) - held_back)


@dataclass(frozen=True)
class Decoders:
    """Example: a compiled decoder of chunks of 24 branches with reward.rows = 16: both in calls of 12."""

    own: ImageDecoder
    """the model's, for evaluation and pictures"""
    light: ImageDecoder
    """for the rewards of branches; where there is no lighter one, the model's"""
    rows: int
    """latents of a call"""


def choose_decoders(config: Config, policy: Policy, tail_rows: int) -> Decoders:
    """A compiled decoder gets calls of one size, into which a chunk of `tail_rows` branches goes evenly."""
    path, compiled, most = config.tails.decoder, config.tails.compile_vae, config.reward.rows
    light = policy.light_decoder(path, compiled) if path else policy
    if not compiled:
        return Decoders(policy, light, most)
    rows = even_rows(tail_rows, most)
    return Decoders(FullCalls(policy, rows), FullCalls(light, rows), rows)
