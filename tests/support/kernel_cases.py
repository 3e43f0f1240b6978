"""Inputs and a float64 oracle for the kernel tests: the definitions restated, independently of the package.

The oracle knows nothing of the algebra the package uses: log-ratios are differences of two log-densities at the next
latents that were drawn, as each method defines them, the loss is the textbook clipped objective, gradients come from
autograd.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from tempflow_kernels.plain.reference import Branches
from torch.distributions import Normal, kl_divergence

DOUBLE = torch.float64
OPTIONAL = ("velocity_ref", "velocity_uncond", "kl_weights")
SEED = 20


@dataclass
class Case:
    """One batch: rows of which the second is an ODE step, keys with awkward bit patterns."""

    shape: tuple[int, ...] = (3, 7, 11)
    rows: int = 4
    siblings: int = 3
    dtype: torch.dtype = torch.float32
    stored_noise: bool = False
    method: str = "gaussian"
    """Whose log-ratio it is: gaussian (TempFlow-GRPO, Flow-GRPO), guard (GRPO-Guard), cps (Flow-CPS), free."""
    optional: tuple[str, ...] = OPTIONAL
    guidance: float = 1.5
    clip_range: tuple[float, float] = (5e-4, 1e-3)
    kl_coef: float = 0.05
    distance: float = 1e-2
    device: str = "cpu"
    seed: int = SEED
    tensors: dict = field(default_factory=dict)

    def __post_init__(self):
        generator = torch.Generator().manual_seed(self.seed)

        def draw(*shape):
            return torch.randn(shape, generator=generator)

        rows, size = self.rows, (self.rows, *self.shape)
        coef = torch.tensor([[0.9, -0.1, 0.3], [1.0, -0.1, 0.0], [0.8, -0.2, 0.7], [0.95, -0.05, 0.2]])
        # From 3e8 above the 32-bit border of the counter to 3 below it, and negative ones: all bit patterns are valid.
        key = torch.tensor([[7, 2**32 - 3], [-1, -5], [2**63 - 1, 2**40 + 1], [0x0123456789ABCDEF, 0]])
        velocity = draw(*size)
        self.tensors = {
            "latents": draw(*size).to(self.dtype),
            "velocity": velocity.to(self.dtype),
            "velocity_old": (velocity + self.distance * draw(*size)).to(self.dtype),
            "velocity_ref": draw(*size).to(self.dtype),
            "velocity_uncond": (velocity + self.distance * draw(*size)).to(self.dtype),
            "advantages": draw(rows, self.siblings),
            "weights": torch.tensor([1.0, 0.5, 2.0, 0.0]).repeat(-(-rows // 4))[:rows],
            "kl_weights": torch.tensor([1.0, 1.0, 0.25, 2.0]).repeat(-(-rows // 4))[:rows],
            "coef": coef.repeat(-(-rows // 4), 1)[:rows],
            "key": key.repeat(-(-rows // 4), 1)[:rows],
            "noise": draw(rows, self.siblings, *self.shape).to(self.dtype),
        }
        self.tensors["terms"] = self._terms(draw(rows, 2))
        self.tensors = {name: tensor.to(self.device) for name, tensor in self.tensors.items()}

    def __getattr__(self, name):
        tensors = self.__dict__.get("tensors", {})
        if name not in tensors:
            raise AttributeError(name)
        if name in OPTIONAL and name not in self.optional:
            return None
        if name in ("key", "noise") and (name == "noise") != self.stored_noise:
            return None
        return tensors[name]

    @property
    def elements(self):
        return int(np.prod(self.shape))

    def _terms(self, free):
        """(R, 4) terms of the method, rounded once from float64; a float64 case keeps them exact."""
        _, v_coef, std = self.tensors["coef"].double().unbind(1)
        product = torch.where(std > 0, v_coef / torch.where(std > 0, std, 1.0), 0.0)
        kl = product**2 / 2 * (self.tensors["kl_weights"].double() if "kl_weights" in self.optional else 1.0)
        square, product = {
            "gaussian": (product**2 / 2, product),
            "guard": (torch.zeros_like(std), torch.where(std > 0, v_coef, 0.0)),
            "cps": (v_coef**2, 2 * v_coef * std),
            "free": free.double().unbind(1),
        }[self.method]
        terms = torch.stack([self.tensors["weights"].double(), square, product, kl], dim=1)
        return terms if self.dtype == DOUBLE else terms.float()

    @property
    def branches(self):
        """What the operators of the loss share."""
        names = ("velocity", "velocity_old", "terms", "key", "noise", "velocity_ref")
        return Branches(*(getattr(self, name) for name in names), self.kl_coef)

    @property
    def ratio_branches(self):
        """The same without reference policy, as `log_ratio` gives it."""
        return self.branches._replace(velocity_ref=None, kl_coef=0.0)

    @property
    def loss_arguments(self):
        """Arguments of `branch_loss` of a backend module."""
        return self.branches, self.advantages, *self.clip_range

    def __str__(self):
        shape, dtype = "x".join(map(str, self.shape)), str(self.dtype).removeprefix("torch.")
        noise = "stored" if self.stored_noise else "drawn"
        return f"{shape}-K{self.siblings}-{dtype}-{noise}-{self.method}-{len(self.optional)}opt"


def philox_words(counter, key):
    """Philox4x32-10 on numpy uint64 arrays of 32-bit words, straight from the paper."""
    c, (k0, k1) = [np.asarray(word, dtype=np.uint64) for word in counter], key
    mask = np.uint64(0xFFFFFFFF)
    for _ in range(10):
        a, b = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        high = np.uint64(32)
        c = [(b >> high) ^ c[1] ^ np.uint64(k0), b & mask, (a >> high) ^ c[3] ^ np.uint64(k1), a & mask]
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c


def oracle_draw(seed, offset, elements):
    """Normal deviates of one draw: fp32 uniforms and angles as specified, float64 from there."""
    counters = [(offset + i) % 2**64 for i in range(-(-elements // 4))]
    low, high = (np.array([c >> shift & 0xFFFFFFFF for c in counters], dtype=np.uint64) for shift in (0, 32))
    zero = np.zeros_like(low)
    seed %= 2**64
    words = philox_words((low, high, zero, zero), (seed & 0xFFFFFFFF, seed >> 32))
    uniforms = [np.float32(word.astype(np.float32).astype(np.float64) * 2.0**-32 + 2.0**-33) for word in words]
    lanes = []
    for first, second in (uniforms[:2], uniforms[2:]):
        radius = np.sqrt(-2.0 * np.log(first.astype(np.float64)))
        angle = (np.float32(2 * np.pi) * second).astype(np.float64)
        lanes += [radius * np.cos(angle), radius * np.sin(angle)]
    return np.stack(lanes, axis=1).ravel()[:elements]


def oracle_noise(case):
    """(R, K, D...) float64 on the device of the case."""
    if case.stored_noise:
        return case.noise.double()
    quads = -(-case.elements // 4)
    draws = [
        oracle_draw(int(seed), int(offset) + sibling * quads, case.elements)
        for seed, offset in case.key.tolist()
        for sibling in range(case.siblings)
    ]
    return torch.tensor(np.stack(draws)).view(case.rows, case.siblings, *case.shape).to(case.device)


def _columns(case):
    """x_coef, v_coef, std shaped (R, 1, 1...) for (R, K, D...)."""
    ones = [1] * (len(case.shape) + 1)
    return [column.view(-1, *ones) for column in case.coef.double().unbind(1)]


def _mean(values):
    return values.flatten(2).mean(2)


def guided_velocity(case):
    """The velocity of a step with classifier-free guidance, (R, 1, D...) float64."""
    velocity = case.velocity.double()
    if case.velocity_uncond is not None:
        velocity = (1 - case.guidance) * case.velocity_uncond.double() + case.guidance * velocity
    return velocity.unsqueeze(1)


def oracle_step(case, noise):
    """next_latents, log_prob with the guided velocity."""
    x_coef, v_coef, std = _columns(case)
    mean = x_coef * case.latents.double().unsqueeze(1) + v_coef * guided_velocity(case)
    following = mean + std * noise
    return following, oracle_log_prob(following, mean, std)


def oracle_log_prob(following, mean, std):
    log_prob = _mean(Normal(mean, torch.where(std > 0, std, 1.0)).log_prob(following))
    return torch.where(std.flatten(1) > 0, log_prob, 0.0)


def oracle_log_ratio(case, noise, velocity):
    """Difference of two densities at the next latents that the old velocity and the noise gave; (R, K)."""
    if case.method == "free":
        return _free_log_ratio(case, noise, velocity)
    x_coef, v_coef, std = _columns(case)
    start = x_coef * case.latents.double().unsqueeze(1)
    old, new = start + v_coef * case.velocity_old.double().unsqueeze(1), start + v_coef * velocity
    following = old + std * noise
    if case.method == "cps":  # minus the squared distance from the mean, without variance
        return _mean((following - old).square()) - _mean((following - new).square())
    ratios = oracle_log_prob(following, new, std) - oracle_log_prob(following, old, std)
    if case.method == "gaussian":
        return ratios
    safe = torch.where(std > 0, std, 1.0)  # guard: the mean of the log-ratio taken out, then times std
    return torch.where(std.flatten(1) > 0, (ratios + _mean((new - old).square() / (2 * safe**2))) * std.flatten(1), 0.0)


def _free_log_ratio(case, noise, velocity):
    """The definition itself, branch by branch."""
    delta = case.velocity_old.double() - velocity.squeeze(1)
    ratios = [
        -(square * (delta[row] ** 2).mean() + product * (delta[row] * noise[row, sibling]).mean())
        for row, (_, square, product, _) in enumerate(case.terms.double())
        for sibling in range(case.siblings)
    ]
    return torch.stack(ratios).view(case.rows, case.siblings)


def oracle_loss(case, noise):
    """loss, stats (7,), gradient of velocity."""
    velocity = case.velocity.double().clone().requires_grad_()
    log_ratios = oracle_log_ratio(case, noise, velocity.unsqueeze(1))
    ratio, (low, high) = log_ratios.exp(), case.clip_range
    gain = case.weights.double().unsqueeze(1) * case.advantages.double()
    policy = torch.maximum(-gain * ratio, -gain * ratio.clamp(1 - low, 1 + high)).mean()
    kl = oracle_kl(case, velocity.unsqueeze(1))
    loss = policy + case.kl_coef * kl
    loss.backward()
    outside = ((ratio < 1 - low) | (ratio > 1 + high)).double().mean()
    approx = (torch.expm1(log_ratios) - log_ratios).mean()
    size = log_ratios.abs()
    stats = torch.stack([ratio.mean(), ratio.max(), outside, approx, kl, size.mean(), size.max()])
    return loss.detach(), stats.detach(), velocity.grad


def oracle_kl(case, velocity):
    """Mean over rows of the weighted KL between the two Gaussians of a step, mean over elements."""
    if case.velocity_ref is None:
        return torch.zeros((), dtype=DOUBLE, device=case.device)
    _, v_coef, std = _columns(case)
    safe = torch.where(std > 0, std, 1.0)
    new, old = (Normal(v_coef * v, safe) for v in (velocity, case.velocity_ref.double().unsqueeze(1)))
    rows = _mean(kl_divergence(new, old))
    rows = torch.where(std.flatten(1) > 0, rows, 0.0)[:, 0]
    return (rows if case.kl_weights is None else rows * case.kl_weights.double()).mean()
