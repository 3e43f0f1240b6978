"""Pictures of prompts from fixed noises, exactly as a run's evaluations make them.

Every picture is of one network call, whose rows are the same whatever the number of processes: so are its bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tempflow.common.draws import EVALUATION, Draw
from tempflow.common.tensors import chunks
from tempflow.credit.decoding import Decoded, decode_branches, even_rows
from tempflow.explore.schedule import NoiseSchedule
from tempflow.explore.tails.engine import EagerEngine
from tempflow.parallel.ranks import Ranks
from tempflow.prompts import Prompt
from tempflow.run.evaluation import evaluation_schedule, sample_latents
from tempflow.run.spreading import spread_out
from tempflow.settings.fields import Config
from tempflow.trained.opening import Loaded, load_untrained


@dataclass(frozen=True)
class Places:
    """P pictures of n prompts with N noises each, prompt by prompt; P = n N."""

    slots: Tensor
    """(P,) int64, which prompt"""
    noises: Tensor
    """(P,) int64, which of its noises"""
    calls: tuple[slice, ...]
    """the pictures of each network call"""


def places_of(prompts: int, noises: int, rows: int) -> Places:
    """All pictures, in the fewest calls of at most `rows`."""
    slots, index = torch.arange(prompts).repeat_interleave(noises), torch.arange(noises).repeat(prompts)
    return Places(slots, index, tuple(chunks(len(slots), even_rows(len(slots), rows))))


@dataclass(frozen=True)
class Sampler:
    """A model, plain network calls and the model's own decoder."""

    loaded: Loaded
    schedule: NoiseSchedule
    prompts: Sequence[Prompt]
    places: Places
    seed: int
    """of the noises; with the order of the prompts it decides them"""
    decode_rows: int

    def __call__(self, call: slice) -> Decoded:
        """The pictures of one network call."""
        policy, own = self.loaded.policy, Draw(self.seed, EVALUATION, self.places.slots[call], self.places.noises[call])
        engine, prompts = EagerEngine(policy, len(own.slots)), self.prompts_of(call)
        return decode_branches(policy, sample_latents(policy, engine, self.schedule, own, prompts), self.decode_rows)

    def prompts_of(self, call: slice) -> list[Prompt]:
        """The prompt of each of its pictures."""
        return [self.prompts[slot] for slot in self.places.slots[call].tolist()]


def load_sampler(
    config: Config, ranks: Ranks, prompts: Sequence[Prompt], places: Places, seed: int
) -> tuple[Sampler, Ranks]:
    """The model of settings before training; one that a run shared out over processes is here, if there are several.

    Returns:
        The sampler, and the processes in their groups.
    Raises:
        BadInput: the model does not load.
    """
    if ranks.size == 1:
        config = replace(config, parallel=replace(config.parallel, shard="none"))
    spreading = spread_out(replace(config, tails=replace(config.tails, merged=False)), ranks)
    loaded = load_untrained(config, ranks.device, spread=spreading.shards, slowest=ranks.largest)
    loaded.policy.prepare_decoder(False)
    schedule = evaluation_schedule(config, loaded.policy)
    return Sampler(loaded, schedule, prompts, places, seed, config.reward.rows), spreading.ranks
