"""The parts that one training step needs: made in `assembly.py`, used in `train.py`."""

from __future__ import annotations

from dataclasses import dataclass

from tempflow.common.clock import PhaseClock
from tempflow.credit.scoring import ScoreQueue
from tempflow.explore.feed import Feed
from tempflow.explore.schedule import NoiseSchedule
from tempflow.explore.tails.engine import Numerics, TailEngine
from tempflow.learn.noise import LossNoise
from tempflow.learn.stepper import Stepper
from tempflow.method import Method
from tempflow.parallel.ranks import Ranks
from tempflow.policy import ImageDecoder, Policy
from tempflow.rewards.panel import Panel
from tempflow.settings.fields import Config


@dataclass(frozen=True)
class Trainer:
    """One process's parts of a run. Example: TempFlow-GRPO on digits: one tail, a feed of 12 prompts, 24 trunks."""

    config: Config
    policy: Policy
    schedule: NoiseSchedule
    method: Method
    feed: Feed
    numerics: Numerics
    """the context of every network call that learning repeats: compiled blocks, or nothing"""
    tails: tuple[TailEngine, ...]
    """V ways from a branch to an image"""
    decoder: ImageDecoder
    """the model's own, for evaluation"""
    scores: ScoreQueue
    """which decodes with it or with a light one"""
    rewards: Panel
    """M scorers"""
    noise: LossNoise
    stepper: Stepper
    ranks: Ranks
    clock: PhaseClock
