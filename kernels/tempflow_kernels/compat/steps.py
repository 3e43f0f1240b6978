"""What the drop-in functions share: keys from generators, tables of a schedule, means, draws and densities."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Optional, Union

import torch
from torch import Tensor

from ..checks import check_like, check_rows, check_tensor, expect
from ..ops import transition_log_prob, transition_step

LOG_SQRT_TWO_PI = 0.5 * math.log(2 * math.pi)
OWNERS = {
    "determistic": "tempflow_grpo",
    "noise_level": "flow_grpo and flow_cps",
    "sde_type": "flow_grpo",
    "return_sqrt_dt": "flow_grpo",
}
"""Keywords that functions of the same name differ in, and the modules of this folder whose function has them."""
Generators = Optional[Union[torch.Generator, Sequence[torch.Generator]]]  # noqa: UP007, UP045 - not an annotation: 3.9 runs it


def exact_signature(function: Callable) -> Callable:
    """Makes a keyword that the replaced function does not have an error of one line that names who has it.

    Raises:
        TypeError: when the function is called with such a keyword.
    """
    known, place = inspect.signature(function).parameters, f"{function.__module__.split('.')[-1]}.{function.__name__}"

    @functools.wraps(function)
    def checked(*arguments, **keywords):
        for name in keywords.keys() - known.keys():
            owner = f"; {OWNERS[name]} in this folder has it" if name in OWNERS else ""
            raise TypeError(f"{name}: found a keyword that {place} does not have, expected {', '.join(known)}{owner}")
        return function(*arguments, **keywords)

    return checked


def draw_keys(rows: int, device: torch.device, generator: Generators) -> Tensor:
    """(R, 2) noise keys: 62 random bits per row, offset 0.

    Args:
        generator: of any device; a list of R gives each row a key of its own generator, as in diffusers.
    Raises:
        ValueError: neither a generator nor a list of 1 or R of them.
    """
    given = list(generator) if isinstance(generator, (list, tuple)) else [generator]
    known = all(one is None or isinstance(one, torch.Generator) for one in given)
    found = type(generator).__name__ if len(given) == 1 else f"a list of {len(given)}"
    expect(known and len(given) in (1, rows), "generator", found, f"a torch.Generator or a list of 1 or {rows} of them")
    seeds = [_random_bits(rows // len(given), device, one) for one in given]
    seed = torch.cat(seeds).to(device)
    return torch.stack([seed, torch.zeros_like(seed)], dim=1)


def _random_bits(count: int, device: torch.device, generator: torch.Generator | None) -> Tensor:
    source = device if generator is None else generator.device  # a generator draws on its own device only
    return torch.randint(0, 2**62, (count,), dtype=torch.int64, device=source, generator=generator)


def mean_of(sample: Tensor, model_output: Tensor, coef: Tensor) -> Tensor:
    """The mean of the step (R, D...), differentiable in `model_output`."""
    x_coef, v_coef, _ = (column.view(-1, *[1] * (sample.dim() - 1)) for column in coef.unbind(1))
    return torch.addcmul(x_coef * sample, v_coef, model_output)


def draw(sample: Tensor, model_output: Tensor, coef: Tensor, generator: Generators, siblings: int = 1):
    """Next samples (R, K, D...) from fresh keys and their log-density (R, K), both without gradient."""
    with torch.no_grad():
        key = draw_keys(sample.shape[0], sample.device, generator)
        return transition_step(sample, model_output, coef, key, siblings)


def log_density(following: Tensor, sample: Tensor, model_output: Tensor, coef: Tensor) -> Tensor:
    """(R, K) mean log-density of `following` (R, K, D...), differentiable in `model_output`; 0 where std = 0."""
    return transition_log_prob(following.detach(), sample, model_output, coef)


def squared_error(following: Tensor, sample: Tensor, model_output: Tensor, coef: Tensor) -> Tensor:
    """(R, K) -(following - mean)^2, mean over elements: the log-density at std = 1 without its constant, doubled."""
    unit = torch.stack([coef[:, 0], coef[:, 1], torch.ones_like(coef[:, 2])], dim=1)
    return 2 * (log_density(following, sample, model_output, unit) + LOG_SQRT_TWO_PI)


class Sigmas(NamedTuple):
    """Of the steps that a call takes: (1,) or (R,) float64 on the CPU, and the schedule's second sigma ()."""

    now: Tensor
    following: Tensor
    second: Tensor


def sigmas_of(scheduler: Any, timestep: Sequence[float] | Tensor, rows: int) -> Sigmas:
    """The sigmas of one timestep for all rows, or of one per row.

    Raises:
        ValueError: another number of timesteps.
    """
    index = torch.tensor([scheduler.index_for_timestep(t) for t in timestep])
    expect(len(index) in (1, rows), "timestep", f"{len(index)} of them", f"one, or one for each of the {rows} rows")
    sigmas = scheduler.sigmas.detach().double().cpu()
    return Sigmas(sigmas[index], sigmas[index + 1], sigmas[1])


def checked_inputs(model_output: Tensor, sample: Tensor, prev_sample: Tensor | None) -> tuple[Tensor, ...]:
    """The same in fp32, on one device and of one shape.

    Raises:
        ValueError: something that is no tensor, or does not fit.
    """
    check_rows("sample", sample)
    check_like(sample, model_output=model_output)
    if prev_sample is None:
        return model_output.float(), sample.float(), None
    check_tensor("prev_sample", prev_sample, sample.shape, sample.device)
    return model_output.float(), sample.float(), prev_sample.float()


def to_rows(table: Tensor, sample: Tensor) -> Tensor:
    """(1, C) or (R, C) float64 coefficients as (R, C) fp32 on the device of the sample."""
    return table.float().to(sample.device).expand(sample.shape[0], table.shape[1])


def broadcast(table: Tensor, sample: Tensor) -> Tensor:
    """(1,) or (R,) float64 numbers as (1, 1...) or (R, 1...) fp32 on the device of the sample, as the originals do."""
    return table.float().to(sample.device).view(-1, *[1] * (sample.dim() - 1))
