"""The eager sequences that the operators replace, written without what would be unfairly slow (float64, loops).

The baseline is what Flow-GRPO runs: `torch.randn`, mean, next latents, log-density for the step; mean, log-density of
the stored next latents, ratio, clip, mean for the loss. The last two restate the steps of the functions that the
drop-in functions replace.
"""

import math

import torch

GUIDANCE, LOW, HIGH = 4.5, 1e-4, 1e-4
HALF_LOG_TWO_PI = 0.5 * math.log(2 * math.pi)


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


def eager_guided_step(latents, velocity, uncond, x_coef, v_coef, std):
    """Guidance in the dtype of the model, then the step."""
    return eager_step(latents, uncond + GUIDANCE * (velocity - uncond), x_coef, v_coef, std)


def eager_ode_step(latents, velocity, x_coef, v_coef):
    """The step without noise."""
    return x_coef * latents.float() + v_coef * velocity.float()


def eager_log_prob(velocity, latents, value, x_coef, v_coef, std):
    """mean, log-density of the stored next latents."""
    return log_density(value, x_coef * latents.float() + v_coef * velocity.float(), std)


def eager_log_ratio(velocity, latents, value, old_log_prob, x_coef, v_coef, std):
    """The difference of two log-densities."""
    return eager_log_prob(velocity, latents, value, x_coef, v_coef, std) - old_log_prob


def eager_loss(velocity, latents, value, old_log_prob, advantages, x_coef, v_coef, std):
    """mean, log-density of the stored next latents, ratio, clipped objective."""
    ratio = torch.exp(eager_log_ratio(velocity, latents, value, old_log_prob, x_coef, v_coef, std))
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - LOW, 1 + HIGH)).mean()


def eager_shared_loss(velocity, velocity_old, noise, advantages, v_coef, std):
    """The clipped objective of K siblings of a row from its one velocity and their stored noise (R, K, D...)."""
    moved = (v_coef * (velocity.float() - velocity_old.float()).unsqueeze(1)) / std
    ratio = torch.exp(-(moved * (0.5 * moved - noise)).mean(dim=tuple(range(2, noise.dim()))))
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - LOW, 1 + HIGH)).mean()


def eager_flow_grpo(scheduler, velocity, timesteps, sample, noise_level, value):
    """The steps of Flow-GRPO's function: tables of the batch, mean, noise, log-density; value is drawn if None."""
    velocity, sample = velocity.float(), sample.float()
    index = [scheduler.index_for_timestep(t) for t in timesteps]
    shape = (-1, *[1] * (sample.dim() - 1))
    sigmas = scheduler.sigmas.to(sample.device)
    sigma, following = sigmas[index].view(shape), sigmas[[i + 1 for i in index]].view(shape)
    level = torch.sqrt(sigma / (1 - torch.where(sigma == 1, sigmas[1], sigma))) * noise_level
    step = sigma - following
    mean = sample * (1 - level**2 / (2 * sigma) * step) - velocity * (1 + level**2 * (1 - sigma) / (2 * sigma)) * step
    std = level * torch.sqrt(step)
    if value is None:
        value = mean + std * torch.randn_like(mean)
    return value, log_density(value.detach(), mean, std), mean, level


def eager_dance_grpo(velocity, latents, eta, sigmas, index, value):
    """The steps of DanceGRPO's function: ODE mean, predicted data, score, drift, log-density."""
    sigma, step = sigmas[index], sigmas[index] - sigmas[index + 1]
    data = latents - sigma * velocity
    score = -(latents - data * (1 - sigma)) / sigma**2
    mean = latents - step * velocity + 0.5 * eta**2 * score * step
    std = eta * torch.sqrt(step)
    return value, data, log_density(value.detach().float(), mean.float(), std)
