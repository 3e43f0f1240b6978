"""What is measured of the kernels: shapes of real use, every operator and mode, and the sequences they replace.

The sequences are in `kernel_sequences`; they work on R x K rows, as in the projects they come from, with the same
inputs.

Modes: `forward` (of differentiable operators with a graph recorded, as in training), `backward` (of a graph that is
there), `full` (both).
"""

import math
from dataclasses import dataclass
from functools import cached_property
from types import SimpleNamespace

import tempflow_kernels as tk
import torch
from operators.eager import (
    GUIDANCE,
    HIGH,
    LOW,
    eager_dance_grpo,
    eager_flow_grpo,
    eager_guided_step,
    eager_log_prob,
    eager_log_ratio,
    eager_loss,
    eager_ode_step,
    eager_shared_loss,
    eager_step,
    per_branch,
)
from tempflow_kernels._ops import ops
from tempflow_kernels.compat.dance_grpo import flux_step
from tempflow_kernels.compat.flow_grpo import sde_step_with_logprob

SHAPES = {
    "sd35_512": (16, 64, 64),
    "sd35_1024": (16, 128, 128),
    "flux_1024": (4096, 64),
    "wan_480p": (16, 21, 60, 104),
    "tiny": (4, 8, 8),
}
ALL = ("forward", "backward", "full")
OPERATORS = {
    "normal": ("forward",),
    "step": ("forward",),
    "guided_step": ("forward",),
    "ode_step": ("forward",),
    "log_prob": ALL,
    "log_ratio": ALL,
    "loss": ALL,
    "flow_grpo_draw": ("forward",),
    "flow_grpo": ALL,
    "dance_grpo": ALL,
}
POINTS = [(operator, mode) for operator, modes in OPERATORS.items() for mode in modes]
COMPILED = ("step", "guided_step", "log_prob", "log_ratio", "loss")
"""Operators whose eager sequence torch.compile is asked to fuse: one randn has nothing to fuse, and users of the
drop-in functions call them as they are."""
ETA, INDEX = 0.3, 4
SIGMAS = torch.tensor([1.0, 0.9601, 0.9133, 0.8577, 0.7904, 0.7073, 0.6022, 0.4649, 0.278, 0.0089, 0.0])
SCHEDULER = SimpleNamespace(sigmas=SIGMAS, index_for_timestep=lambda t: int((SIGMAS - float(t) / 1000).abs().argmin()))
"""What the functions of Flow-GRPO ask of a diffusers scheduler."""


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

    @property
    def row(self):
        """The size as fields of a result row."""
        return {"shape": self.shape, "rows": self.rows, "siblings": self.siblings, "dtype": str(self.dtype)}


class Inputs:
    """Tensors of one setting, per row for the operators and, where asked for, repeated per branch."""

    def __init__(self, setting):
        torch.manual_seed(0)
        self.setting = setting
        size, options = (setting.rows, *SHAPES[setting.shape]), {"device": setting.device}
        self.latents = torch.randn(size, **options).to(setting.dtype)
        self.velocity = torch.randn(size, **options).to(setting.dtype).requires_grad_()
        self.velocity_old = (self.velocity.detach().float() + 1e-3 * torch.randn(size, **options)).to(setting.dtype)
        self.coef = torch.tensor([[0.9, -0.1, 0.3]], **options).repeat(setting.rows, 1)
        self.ode_coef = torch.tensor([[1.0, -0.1, 0.0]], **options).repeat(setting.rows, 1)
        self.key = torch.stack([torch.arange(setting.rows, **options)] * 2, dim=1)
        self.advantages = torch.randn(setting.rows, setting.siblings, **options)
        self.terms = tk.gaussian_terms(self.coef)
        self.one = torch.ones((), **options)
        step = (self.latents, self.velocity_old, self.coef, self.key)
        self.next_latents, log_prob = tk.transition_step(*step, siblings=setting.siblings)
        self.old_log_prob = log_prob.flatten()

    def branches(self, tensor):
        """A per-row tensor as R x K rows; the sequences that are replaced work on these."""
        return tensor.detach().repeat_interleave(self.setting.siblings, 0)

    @cached_property
    def branch_latents(self):
        return self.branches(self.latents)

    @cached_property
    def branch_velocity(self):
        return self.branches(self.velocity).requires_grad_()

    @cached_property
    def branch_old(self):
        return self.branches(self.velocity_old)

    @cached_property
    def noise(self):
        """(R, K, D...) fp32, for a loss that reads it."""
        return torch.randn(self.next_latents.shape, device=self.latents.device)

    @property
    def value(self):
        """The stored next latents as R x K rows."""
        return self.next_latents.flatten(0, 1)

    @cached_property
    def timesteps(self):
        return [1000 * float(SIGMAS[INDEX])] * (self.setting.rows * self.setting.siblings)


def fused(i):
    """Per operator its function and, if it is differentiable, the tensor it is a function of."""
    k, latents, sigmas = i.setting.siblings, i.branch_latents, SIGMAS.to(i.setting.device)
    step = (i.latents, i.velocity_old, i.coef, i.key, k)
    compat = (SCHEDULER, i.branch_old, i.timesteps, latents)
    return {
        "normal": (lambda: tk.normal_like(i.latents, i.key, k), None),
        "step": (lambda: tk.transition_step(*step), None),
        "guided_step": (lambda: tk.transition_step(*step, i.latents, GUIDANCE), None),
        "ode_step": (lambda: tk.transition_step(i.latents, i.velocity_old, i.ode_coef, i.key, k), None),
        "log_prob": (lambda v: tk.transition_log_prob(i.next_latents, i.latents, v, i.coef), i.velocity),
        "log_ratio": (lambda v: tk.log_ratio(v, i.velocity_old, i.coef, i.key, k), i.velocity),
        "loss": (
            lambda v: tk.branch_loss(v, i.velocity_old, i.advantages, i.terms, i.key, None, (LOW, HIGH))[0],
            i.velocity,
        ),
        "flow_grpo_draw": (lambda: sde_step_with_logprob(*compat), None),
        "flow_grpo": (
            lambda v: sde_step_with_logprob(SCHEDULER, v, i.timesteps, latents, 0.7, i.value)[1],
            i.branch_velocity,
        ),
        "dance_grpo": (
            lambda v: flux_step(v, latents, ETA, sigmas, INDEX, i.value, True, True)[2],
            i.branch_velocity,
        ),
    }


def fused_stored(i):
    """The fused loss that reads its noise instead of drawing it."""
    given = (None, i.noise, (LOW, HIGH))
    return {"loss": (lambda v: tk.branch_loss(v, i.velocity_old, i.advantages, i.terms, *given)[0], i.velocity)}


def eager(i, transform=lambda function: function):
    """The sequences that the operators replace; `transform` may be torch.compile."""
    coef, ode_coef = (per_branch(given, i.setting.siblings, i.latents.dim()) for given in (i.coef, i.ode_coef))
    latents, old, value, leaf = i.branch_latents, i.branch_old, i.value, i.branch_velocity
    sigmas, advantages = SIGMAS.to(i.setting.device), i.advantages.flatten()
    compat = (SCHEDULER, old, i.timesteps, latents)
    step, guided_step, log_prob, log_ratio, loss = map(
        transform, (eager_step, eager_guided_step, eager_log_prob, eager_log_ratio, eager_loss)
    )
    return {
        "normal": (lambda: torch.randn(i.next_latents.shape, device=latents.device), None),
        "step": (lambda: step(latents, old, *coef), None),
        "guided_step": (lambda: guided_step(latents, old, latents, *coef), None),
        "ode_step": (lambda: eager_ode_step(latents, old, *ode_coef[:2]), None),
        "log_prob": (lambda v: log_prob(v, latents, value, *coef), leaf),
        "log_ratio": (lambda v: log_ratio(v, latents, value, i.old_log_prob, *coef), leaf),
        "loss": (lambda v: loss(v, latents, value, i.old_log_prob, advantages, *coef), leaf),
        "flow_grpo_draw": (lambda: eager_flow_grpo(*compat, 0.7, None), None),
        "flow_grpo": (lambda v: eager_flow_grpo(SCHEDULER, v, i.timesteps, latents, 0.7, value)[1], leaf),
        "dance_grpo": (lambda v: eager_dance_grpo(v, latents, ETA, sigmas, INDEX, value)[2], leaf),
    }


def _anew():
    """Forgets what was compiled; `backward` runs several times over one graph, so that its buffers must stay."""
    torch._dynamo.reset()
    torch._functorch.config.donated_buffer = False


def compiled(i):
    """torch.compile of the eager sequences."""
    _anew()
    functions = eager(i, lambda function: torch.compile(function, dynamic=False))
    return {operator: functions[operator] for operator in COMPILED}


def stored(i):
    """torch.compile of a loss that shares the row among its siblings, as ours does, but reads stored fp32 noise."""
    _anew()
    loss = torch.compile(eager_shared_loss, dynamic=False)
    v_coef, std = (i.coef[:, column].view(-1, 1, *[1] * (i.latents.dim() - 1)) for column in (1, 2))
    return {"loss": (lambda v: loss(v, i.velocity_old, i.noise, i.advantages, v_coef, std), i.velocity)}


PROVIDERS = {"stored": stored, "fused": fused, "eager": eager, "compiled": compiled}
STORED = "stored"
READING = {("fused", STORED): fused_stored}
"""Providers of which some operators also take noise that is stored, which is then their noise mode."""


def callables(inputs, provider, noise=None):
    """{(operator, mode): callable} of one provider; `noise` is STORED or, of all operators, whatever they draw."""
    calls = {}
    for operator, (function, leaf) in READING.get((provider, noise), PROVIDERS[provider])(inputs).items():
        modes = {"forward": function} if leaf is None else _modes(function, leaf, inputs)
        calls |= {(operator, mode): call for mode, call in modes.items()}
    return calls


def _modes(function, leaf, inputs):
    graph = []

    def backward():
        if not graph:
            result = function(leaf)
            graph.extend((result, torch.ones_like(result) / result.numel()))
        return torch.autograd.grad(graph[0], leaf, graph[1], retain_graph=True)

    return {
        "forward": lambda: function(leaf),
        "backward": backward,
        "full": lambda: torch.autograd.grad(function(leaf).mean(), leaf),
    }


def kernels_alone(i, noise=None):
    """Fused operators without autograd, which can be recorded in a CUDA graph: device time without launches.

    With STORED noise those of the loss alone, which read it.
    """
    k, v = i.setting.siblings, i.velocity.detach()
    source = (None, i.noise) if noise == STORED else (i.key, None)
    slopes, branches = torch.ones_like(i.advantages), (v, i.velocity_old, i.terms, *source, None, 0.0)
    loss = (*branches, i.advantages, LOW, HIGH)
    gradient = (*branches, slopes, i.one)
    log_prob = (i.next_latents, i.latents, v, i.coef)
    of_loss = {
        ("loss", "forward"): lambda: ops.branch_loss(*loss),
        ("loss", "backward"): lambda: ops.velocity_gradient(*gradient),
        ("loss", "full"): lambda: ops.velocity_gradient(*branches, ops.branch_loss(*loss)[2], i.one),
    }
    if noise == STORED:
        return of_loss
    return {
        ("normal", "forward"): lambda: tk.normal_like(i.latents, i.key, k),
        ("step", "forward"): lambda: tk.transition_step(i.latents, v, i.coef, i.key, k),
        ("ode_step", "forward"): lambda: tk.transition_step(i.latents, v, i.ode_coef, i.key, k),
        ("guided_step", "forward"): lambda: tk.transition_step(i.latents, v, i.coef, i.key, k, i.latents, GUIDANCE),
        ("log_prob", "forward"): lambda: ops.transition_log_prob(*log_prob),
        ("log_prob", "backward"): lambda: ops.transition_log_prob_gradient(slopes, *log_prob),
        ("log_ratio", "forward"): lambda: ops.log_ratio(*branches, k),
        ("log_ratio", "backward"): lambda: ops.velocity_gradient(*gradient),
    } | of_loss


def bytes_moved(operator, mode, setting, noise=None):
    """Bytes an operator must read and write at least: every input once per pass, every output once."""
    size = torch.finfo(setting.dtype).bits // 8
    noises, branch = 4 * setting.siblings, size * setting.siblings  # per element of a row: fp32 and model dtype
    read = noises if noise == STORED else 0
    forward, backward = {
        "normal": (noises, 0),
        "step": (2 * size + noises, 0),
        "guided_step": (3 * size + noises, 0),
        "ode_step": (2 * size + noises, 0),
        "log_prob": (2 * size + noises, 3 * size + noises),
        "log_ratio": (2 * size, 3 * size),
        "loss": (2 * size + read, 3 * size + read),
        "flow_grpo_draw": (2 * branch + 2 * noises, 0),
        "flow_grpo": (2 * branch + 2 * noises, 3 * branch + noises),
        "dance_grpo": (3 * branch + noises, 3 * branch + noises),
    }[operator]
    return setting.elements * {"forward": forward, "backward": backward, "full": forward + backward}[mode]
