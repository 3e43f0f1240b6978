"""What is measured of the kernels: shapes of real use, the sequences they replace, bytes moved, and the machine.

The eager baseline is the sequence Flow-GRPO runs: `torch.randn`, mean, next latents, log-density for the step; mean,
log-density of the stored next latents, ratio, clip, mean and `backward` for the loss. It works on R x K rows, as
there, with the same inputs, and its code avoids what would be unfairly slow (no double precision, no loops).
"""

import math
import os
import platform
import subprocess
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import tempflow_kernels as tk
import torch
from tempflow_kernels._ops import ops

SHAPES = {
    "sd35_512": (16, 64, 64),
    "sd35_1024": (16, 128, 128),
    "flux_1024": (4096, 64),
    "wan_480p": (16, 21, 60, 104),
    "tiny": (4, 8, 8),
}
OPERATORS = ("normal", "step", "log_prob", "log_ratio", "loss", "loss_gradient")
GUIDANCE, LOW, HIGH = 4.5, 1e-4, 1e-4
HALF_LOG_TWO_PI = 0.5 * math.log(2 * math.pi)


@dataclass(frozen=True)
class Setting:
    """One measured size: latents of SHAPES[shape], rows R, siblings K."""

    shape: str
    rows: int
    siblings: int
    dtype: torch.dtype = torch.float32
    device: str = "cpu"

    @property
    def elements(self):
        return self.rows * math.prod(SHAPES[self.shape])

    @property
    def label(self):
        return f"{self.shape} R{self.rows} K{self.siblings}"


class Inputs:
    """Tensors of one setting, per row for the operators and repeated per branch for the eager sequences."""

    def __init__(self, setting):
        torch.manual_seed(0)
        self.setting = setting
        size, options = (setting.rows, *SHAPES[setting.shape]), {"device": setting.device}
        self.latents = torch.randn(size, **options).to(setting.dtype)
        self.velocity = torch.randn(size, **options).to(setting.dtype)
        self.velocity_old = (self.velocity.float() + 1e-3 * torch.randn(size, **options)).to(setting.dtype)
        self.coef = torch.tensor([[0.9, -0.1, 0.3]], **options).repeat(setting.rows, 1)
        self.key = torch.stack([torch.arange(setting.rows, **options)] * 2, dim=1)
        self.advantages = torch.randn(setting.rows, setting.siblings, **options)
        self.weights = torch.ones(setting.rows, **options)
        self.one = torch.ones((), **options)
        step = (self.latents, self.velocity_old, self.coef, self.key)
        self.next_latents, log_prob = tk.transition_step(*step, siblings=setting.siblings)
        self.old_log_prob = log_prob.flatten()

    def branches(self, name):
        """A per-row tensor as R x K rows; the eager sequences work on these, as Flow-GRPO does."""
        return getattr(self, name).repeat_interleave(self.setting.siblings, 0)


def per_branch(coef, siblings, dimensions):
    """x_coef, v_coef, std as (R K, 1...)."""
    shape = (-1, *[1] * (dimensions - 1))
    return [column.repeat_interleave(siblings).view(shape) for column in coef.unbind(1)]


def log_density(value, mean, std):
    """Flow-GRPO's log-probability: mean over everything but the row."""
    density = -((value - mean) ** 2) / (2 * std**2) - torch.log(std) - HALF_LOG_TWO_PI
    return density.mean(dim=tuple(range(1, value.dim())))


def eager_step(latents, velocity, x_coef, v_coef, std):
    """randn, mean, next latents, log-density."""
    mean = x_coef * latents.float() + v_coef * velocity.float()
    value = mean + std * torch.randn_like(mean)
    return value, log_density(value, mean, std)


def eager_loss(velocity, latents, value, old_log_prob, advantages, x_coef, v_coef, std):
    """mean, log-density of the stored next latents, ratio, clipped objective."""
    mean = x_coef * latents.float() + v_coef * velocity.float()
    ratio = torch.exp(log_density(value, mean, std) - old_log_prob)
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - LOW, 1 + HIGH)).mean()


def fused(inputs):
    """Callables of our operators, by name."""
    i, k = inputs, inputs.setting.siblings
    ratio = (i.velocity, i.velocity_old, i.coef)
    loss = (i.velocity, i.velocity_old, i.advantages, i.weights, i.coef, i.key, *[None] * 4, LOW, HIGH, 0.0, 1.0)
    gradient = (i.velocity, i.velocity_old, i.coef, i.key, *[None] * 4, 0.0, 1.0)
    return {
        "normal": lambda: tk.normal_like(i.latents, i.key, k),
        "step": lambda: tk.transition_step(i.latents, i.velocity, i.coef, i.key, k),
        "log_prob": lambda: tk.transition_log_prob(i.next_latents, i.latents, i.velocity, i.coef),
        "log_ratio": lambda: tk.log_ratio(*ratio, i.key, k),
        "loss": lambda: ops.branch_loss(*loss),
        "loss_gradient": lambda: ops.velocity_gradient(ops.branch_loss(*loss)[2], i.one, *gradient),
    }


def eager(inputs, transform=lambda function: function):
    """Callables of the sequences that the operators replace; `transform` may be torch.compile."""
    i, k = inputs, inputs.setting.siblings
    coef = per_branch(i.coef, k, i.latents.dim())
    latents, velocity = i.branches("latents"), i.branches("velocity")
    value, advantages = i.next_latents.flatten(0, 1), i.advantages.flatten()
    step, loss, density = transform(eager_step), transform(eager_loss), transform(log_density)
    stored = (latents, value, i.old_log_prob, advantages, *coef)

    def mean():
        return coef[0] * latents.float() + coef[1] * velocity.float()

    def full():
        leaf = velocity.detach().requires_grad_()
        loss(leaf, *stored).backward()
        return leaf.grad

    return {
        "normal": lambda: torch.randn(i.next_latents.shape, device=i.latents.device),
        "step": lambda: step(latents, velocity, *coef),
        "log_prob": lambda: density(value, mean(), coef[2]),
        "log_ratio": lambda: density(value, mean(), coef[2]) - i.old_log_prob,
        "loss": lambda: loss(velocity, *stored),
        "loss_gradient": full,
    }


def bytes_moved(operator, setting):
    """Bytes an operator must read and write at least: inputs once per pass, outputs once."""
    element, noises = torch.finfo(setting.dtype).bits // 8, 4 * setting.siblings
    per_element = {
        "normal": noises,
        "step": 2 * element + noises,
        "log_prob": 2 * element + noises,
        "log_ratio": 2 * element,
        "loss": 2 * element,
        "loss_gradient": 5 * element,
    }
    return setting.elements * per_element[operator]


def synchronised(call, device):
    """The call with the device's work finished inside it, for timers that know nothing of devices."""
    if torch.device(device).type != "cuda":
        return call

    def finish():
        result = call()
        torch.cuda.synchronize()
        return result

    return finish


def peak_bytes(call, device):
    """Largest amount of device memory that one call adds; None on CPU, where torch does not count it."""
    if torch.device(device).type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def environment(device):
    """Device, versions, commit and date, for every figure."""
    root = Path(__file__).resolve().parent.parent
    commit = subprocess.run(["git", "-C", root, "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout
    is_cuda = torch.device(device).type == "cuda"
    return {
        "device": torch.cuda.get_device_name() if is_cuda else cpu_name(),
        "threads": None if is_cuda else torch.get_num_threads(),
        "backend": tk.backend_info()["cuda" if is_cuda else "cpu"],
        "native": tk.backend_info()["native"].split(",")[0],
        "torch": torch.__version__,
        "triton": _version("triton"),
        "python": platform.python_version(),
        "commit": commit.strip() or "unknown",
        "date": time.strftime("%Y-%m-%d"),
    }


def cpu_name():
    lines = Path("/proc/cpuinfo").read_text().splitlines() if os.path.exists("/proc/cpuinfo") else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]} ({os.cpu_count()} cores)" if names else platform.processor()


def _version(distribution):
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
