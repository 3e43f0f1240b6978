"""Settings that ask for more memory than there is, refused by arithmetic before anything is allocated.

A floor, not a plan: only what must lie in memory at once whatever else does. `memory.py` counts the rest.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from tempflow.common.errors import BadInput
from tempflow.common.machine import host_memory
from tempflow.forecast.words import Forecast
from tempflow.settings.fields import Config

LARGEST = 2**44
"""Bytes that no machine has; a plan for other machines is held against it."""
COPIES = 16
"""Bytes of a trained parameter: itself, its gradient, its average and one moment or two, fp32."""


def check_fits(forecast: Forecast, device: torch.device) -> None:
    """Refuses what cannot lie in the memory of this process's machine and device.

    Raises:
        BadInput: naming the largest of the settings whose product is too large.
    """
    config = forecast.config
    limit = LARGEST if config.run.plan_only else memory_of(device)
    host = LARGEST if config.run.plan_only else host_memory()
    for needed, most, names, words in _demands(forecast, limit, host):
        if needed > most:
            values = {name: _value(config, name) for name in names}
            name = max(values, key=lambda found: values[found])
            lower = " or ".join(values)
            hint = f"{words} need {needed / 2**30:,.0f} GiB, and there are {most / 2**30:,.0f}; lower {lower}"
            raise BadInput(name, values[name], hint)


def _demands(forecast: Forecast, limit: int, host: int) -> Iterable[tuple[int, int, tuple[str, ...], str]]:
    """Bytes that are needed, bytes that there are, the settings whose product they are, and what they are for."""
    config, cost, skeleton = forecast.config, forecast.cost(), forecast.skeleton
    branches = ("explore.prompts", "explore.noises", "explore.siblings")
    image = torch.Size(skeleton.image_shape).numel()
    latent = 4 * torch.Size(skeleton.latent_shape).numel()
    yield latent + image, min(limit, host), ("sample.height", "sample.width"), "one image and its latents"
    yield cost.state_bytes + cost.branch_bytes, limit, branches, "the latents of an iteration's branches"
    yield cost.image_bytes, host, branches, "the images of an iteration"
    if config.model.train == "lora":
        trained = COPIES * sum(skeleton.trainable_sizes)
        yield trained, limit, ("model.lora_rank",), "adapters, their gradients and moments"
    if config.prompts.test is not None:
        yield latent * config.eval.noises, host, ("eval.noises",), "the noises of one held-out prompt"


def _value(config: Config, name: str) -> int:
    """A number of the settings; 0 where the pipeline chooses."""
    section, field = name.split(".")
    return getattr(getattr(config, section), field) or 0


def memory_of(device: torch.device) -> int:
    """Bytes that a device has in all."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else host_memory()
