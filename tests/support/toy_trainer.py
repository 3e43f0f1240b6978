"""A Trainer on a toy policy, without a file or a network, and recorders of what its training step computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from tempflow.common.clock import PhaseClock
from tempflow.credit.scoring import ScoreQueue
from tempflow.explore.feed import Feed
from tempflow.explore.tails.levels import make_engines
from tempflow.learn.average import MovingAverage
from tempflow.learn.noise import LossNoise
from tempflow.learn.optimizers import make_optimizer
from tempflow.learn.stepper import Stepper
from tempflow.method import read_method
from tempflow.parallel.ranks import Ranks
from tempflow.policy import Conditioning
from tempflow.prompts import Prompt
from tempflow.rewards.panel import Panel
from tempflow.rewards.scorer import Scorer
from tempflow.run.trainer import Trainer
from tempflow.settings.fields import Config
from tempflow.settings.reading import load

SHAPE = (2, 3)
TEXTS = ("a one", "two twos and a three", "a lonely seven", "eight", "no digit at all, only words")
FIRST = {"scale": [[0.7, -0.4, 0.2], [-0.3, 0.5, 0.9]], "bias": [[0.1], [-0.3]], "pull": [0.3, -0.2, 0.4]}
REFERENCE = {"scale": [[0.6, -0.2, 0.3], [-0.1, 0.3, 0.7]], "bias": [[0.3], [-0.1]], "pull": [0.2, -0.3, 0.5]}
"""The policy before training differs from the one that training goes on from."""


def field_of(own: dict[str, Tensor], x: Tensor, sigma: Tensor | float, shift: Tensor | float) -> Tensor:
    """The toy velocity, elementwise, so that a row cannot depend on the batch it is in."""
    return torch.tanh(x * own["scale"] + own["bias"] * shift * sigma) + own["pull"] * x * sigma


def velocity_of_one(own: dict[str, Tensor], x: Tensor, sigma: float, text: str) -> Tensor:
    """As the oracle calls it."""
    return field_of(own, x, sigma, shift_of(text))


def shift_of(text: str) -> float:
    return len(text) / 10


def parameters_of(values: dict[str, list]) -> dict[str, Tensor]:
    return {name: torch.tensor(value) for name, value in values.items()}


class BytesPolicy(nn.Module):
    """Its images are the bytes of its latents: rewards are functions of these without any rounding."""

    def __init__(self, schedule: Callable[[int], Tensor]) -> None:
        super().__init__()
        self.device, self.latent_shape, self.image_shape = torch.device("cpu"), SHAPE, (3, 2, 4)
        self.network_rows, self.attention, self.schedule = 1, "none", schedule
        for name, value in parameters_of(FIRST).items():
            setattr(self, name, nn.Parameter(value))
        self.before = parameters_of(REFERENCE)
        self.copies: dict[str, Tensor] | None = None
        self.own: dict[str, Tensor] = dict(self.named_parameters())

    def sigmas(self, num_steps: int) -> Tensor:
        return self.schedule(num_steps)

    def encode(self, texts: Sequence[str]) -> Conditioning:
        return Conditioning({"shift": torch.tensor([shift_of(text) for text in texts])})

    def velocity(self, latents: Tensor, sigma: Tensor, conditioning: Conditioning, guided: object = True) -> Tensor:
        rows = (-1, 1, 1)
        return field_of(self.own, latents, sigma.view(rows), conditioning.tensors["shift"].view(rows))

    def decode(self, latents: Tensor) -> Tensor:
        return latents.contiguous().view(torch.uint8).view(-1, *self.image_shape)

    def trainable(self) -> dict[str, nn.Parameter]:
        return dict(self.named_parameters())

    @contextmanager
    def _with(self, values: dict[str, Tensor]) -> Iterator[None]:
        kept, self.own = self.own, values
        yield
        self.own = kept

    def reference(self):
        return self._with(self.before)

    def merged(self):
        if self.copies is None:
            self.copies = {name: value.detach().clone() for name, value in self.named_parameters()}
        return self._with(self.copies)

    @torch.no_grad()
    def refresh_merged(self) -> None:
        for name, value in (self.copies or {}).items():
            value.copy_(getattr(self, name))

    def blocks(self) -> list[nn.Module]:
        return []

    def prepare_decoder(self, compiled: bool) -> None:
        pass


def shifted(num_steps: int, shift: float = 3.0) -> Tensor:
    """FLUX's schedule: s = shift t / (1 + (shift - 1) t)."""
    t = torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)
    return shift * t / (1 + (shift - 1) * t)


# ---- scorers: of one image and its text


def tilt(image: Tensor, text: str) -> float:
    return float((image * torch.tensor([[1.0, -0.5, 0.2], [0.3, 0.7, -1.1]])).sum()) * (1 + len(text) % 3)


def curve(image: Tensor, text: str) -> float:
    return float((0.3 * image[0] ** 2 - image[1].abs()).mean()) + 0.1 * len(text)


def choosy(image: Tensor, text: str) -> float:
    """No opinion of some images, the same opinion of all images of a text of five letters."""
    if len(text) == 5:
        return 0.25
    return float("nan") if float(image[0, 1]) > 0.4 else curve(image, text)


def indifferent(image: Tensor, text: str) -> float:
    """Likes all images of most texts alike."""
    return tilt(image, text) if len(text) > 14 else 0.5


Judge = Callable[[Tensor, str], float]


def scorer(name: str, judge: Judge) -> Scorer:
    def score(images: Tensor, prompts: Sequence[Prompt]) -> list[float]:
        latents = images.reshape(len(images), -1).contiguous().view(torch.float32).view(-1, *SHAPE)
        return [judge(latent, prompt.text) for latent, prompt in zip(latents, prompts, strict=True)]

    return Scorer("reward.name", name, score, 7)


def panel_of(judges: Sequence[Judge], weights: Sequence[float]) -> Panel:
    return Panel({judge.__name__: scorer(judge.__name__, judge) for judge in judges}, torch.tensor(list(weights)))


# ---- the trainer, and what is recorded of it


@dataclass
class Record:
    """What one training step computed, for comparison."""

    gradients: list[dict[str, Tensor] | None] = field(default_factory=list)
    """of each optimizer step, before clipping"""
    images: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """(places, finished latents)"""

    def finished(self) -> Tensor:
        """(V S R K, D...)"""
        places, latents = (torch.cat(parts) for parts in zip(*self.images, strict=True))
        return torch.empty_like(latents).index_copy_(0, places, latents)


class RecordingStepper(Stepper):
    def __init__(self, record: Record, *arguments):
        super().__init__(*arguments)
        self.record = record

    def step(self) -> None:
        self.record.gradients.append({name: p.grad.clone() for name, p in self.parameters.items()})
        super().step()

    def idle(self) -> None:
        self.record.gradients.append(None)
        super().idle()


class RecordingQueue(ScoreQueue):
    record: Record

    def submit(self, branches, prompts) -> None:
        self.record.images.append((branches.places.clone(), branches.latents.clone()))
        super().submit(branches, prompts)


ALONE = Ranks(0, 1, torch.device("cpu"))


def make_trainer(config: Config, panel: Panel, ranks: Ranks = ALONE) -> tuple[Trainer, Record]:
    """All parts of a run on one process but its folder."""
    policy, learn, record = BytesPolicy(shifted), config.learn, Record()
    method, noise_schedule = read_method(config, policy.sigmas(config.sample.steps))
    parameters = policy.trainable()
    average = MovingAverage(parameters, learn.ema_decay, learn.ema_every)
    optimizer = make_optimizer(learn, list(parameters.values()))
    clock, prompts = PhaseClock(ranks.device), [Prompt(text) for text in TEXTS]
    queue = RecordingQueue(policy, panel, 5, clock, False)
    queue.record = record
    trainer = Trainer(
        config=config, policy=policy, schedule=noise_schedule, method=method,
        feed=Feed(prompts, config.explore.prompts, config.explore.noises, ranks.share(config.explore.prompts),
                  config.run.seed),
        numerics=nullcontext, tails=make_engines(policy, config.tails, 7, noise_schedule, "a").explore,
        decoder=policy, scores=queue, rewards=panel, noise=LossNoise(learn.noise == "stored"),
        stepper=RecordingStepper(record, parameters, optimizer, average, learn.max_grad_norm),
        ranks=ranks, clock=clock,
    )  # fmt: skip
    return trainer, record


def small(*arguments: str) -> Config:
    """Settings of a preset or none, few prompts on a short schedule."""
    names = [argument for argument in arguments if "=" not in argument]
    overrides = [argument for argument in arguments if "=" in argument]
    return load(["digits", *names, "sample.steps=5", "explore.prompts=2", "learn.rows=2", "learn.lr_schedule=constant",
                 "run.seed=3", *overrides])  # fmt: skip
