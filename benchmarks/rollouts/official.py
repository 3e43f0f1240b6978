"""The released TempFlow-GRPO algorithm as it stands, on the same networks: the baseline of `rollouts.py`.

An implementation of its own of what the public code does (Shredded-Pork/TempFlow-GRPO at e66824ec,
`scripts/train_sd3_pr.py` and `flow_grpo/diffusers_patch/sd3_pipeline_with_logprob_perstep.py`), read line by line:

* One pass per initial noise, at batch 1 (2 network rows with guidance). The trunk is NOT recomputed for every fork: at
  step i its velocity gives both the ODE step of the trunk and the SDE step of K = 6 siblings, whose tails follow at
  once, in an inner loop at batch K, are decoded together and become PIL images. Tails of different forks never share
  a call. This baseline does the same, so its rollout has exactly the network rows of ours; only the calls are smaller.
* After each pass the reward of every fork is submitted to a pool of 8 threads: scoring goes on beside the next pass.
* Training runs on copies: all K siblings are rows with the same latents, shuffled over all initial noises and cut into
  micro-batches of K; per micro-batch and step one forward and backward of the policy, one forward of the reference,
  each with both halves of guidance. Log-probabilities are means over elements; the ratio is taken of their difference.
* Transformer weights fp32 in a 16-bit autocast, fp32 image decoder, fp32 scorer, torch's default attention, no compile.

Differences, each in favour of this baseline or without effect on its speed: texts are encoded once (the released code
runs three text encoders for every initial noise); images cross to the host as bytes, not as floats; the constant 2.25
is the noise weight of the schedule in use; rows without any advantage are not dropped; bf16 stands in for fp16, whose
rate is the same, since random weights may overflow in fp16; epochs 0 and 1 are not thrown away.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from PIL import Image
from tempflow_kernels import normal_like
from torch import Tensor

from tempflow.explore.schedule import ode_step
from tempflow.learn.objective import WEIGHT
from tempflow.policy import Conditioning
from tempflow.prompts import Prompt
from tempflow.run.trainer import Trainer

SCORING_THREADS = 8
STD_EPSILON = 1e-4
Judge = Callable[[list[Image.Image], Sequence[Prompt]], Tensor]
"""PIL images and as many prompts -> as many scores"""


@dataclass(frozen=True)
class Samples:
    """What training reads: S steps, R initial noises, K siblings, each sibling with rows of its own."""

    latents: Tensor
    """(S, R, D...) the trunk where it forks"""
    next_latents: Tensor
    """(S, R, K, D...) after the stochastic step"""
    log_probs: Tensor
    """(S, R, K)"""
    rewards: Tensor
    """(S, R, K)"""
    reward_seconds: float
    """of all scoring threads together"""
    conditioning: Conditioning
    """R rows"""


def official_step(trainer: Trainer, iteration: int, judge: Judge, copies: int) -> tuple[Tensor, float, float]:
    """One iteration of the released algorithm: its rewards (S, R, K), the seconds of all scoring threads together, and
    the norm of its gradient.

    Args:
        copies: rows of a micro-batch in training; K in the released code.
    """
    samples = explore(trainer, iteration, judge)
    advantages = seed_advantages(samples.rewards, trainer.config.credit.clip)
    with trainer.clock("learn"):
        for _ in learn(trainer, samples, advantages, copies):
            trainer.stepper.update(trainer.ranks, idle=False)
        grad_norm = trainer.stepper.read()["grad_norm"]
    return samples.rewards, samples.reward_seconds, grad_norm


@torch.no_grad()
def explore(trainer: Trainer, iteration: int, judge: Judge) -> Samples:
    """Every initial noise in turn: trunk, and at each fork the tails of its siblings."""
    of_iteration, draw = trainer.feed.at(iteration)
    policy, siblings, steps = trainer.policy, trainer.method.siblings, forks_of(trainer)
    prompts = [prompt for prompt in of_iteration for _ in range(trainer.method.noises)]
    conditioning = policy.encode([prompt.text for prompt in prompts])
    initial = draw.initial_noise(policy.latent_shape, policy.device)
    keys = torch.stack([draw.step_keys(step) for step in steps]).to(policy.device)
    forks, scores = [], []
    with ThreadPoolExecutor(SCORING_THREADS) as pool:
        for row, prompt in enumerate(prompts):
            place = slice(row, row + 1)
            states, images = one_noise(trainer, initial[place], keys[:, place], conditioning.rows(place))
            forks.append(states)
            scores += [pool.submit(timed, judge, batch, [prompt] * siblings) for batch in images]
        with trainer.clock("wait"):
            rewards, seconds = collect(scores)
            rewards = rewards.view(len(prompts), -1, siblings).transpose(0, 1)
    stacked = [torch.stack(parts, dim=1) for parts in zip(*forks, strict=True)]
    return Samples(*stacked, rewards, seconds, conditioning)


def forks_of(trainer: Trainer) -> tuple[int, ...]:
    """The steps that fork, the same in every iteration."""
    return trainer.method.rule.forks.pool


def one_noise(
    trainer: Trainer, state: Tensor, keys: Tensor, prompt: Conditioning
) -> tuple[tuple, list[list[Image.Image]]]:
    """The trunk of one initial noise (1, D...) and all its branches: fork states, and K images per fork."""
    siblings, steps = trainer.method.siblings, forks_of(trainer)
    copies = prompt.repeat(siblings)
    latents, next_latents, log_probs, images = [], [], [], []
    for step in range(steps[-1] + 1):
        with trainer.clock("trunk"):
            velocity = velocity_at(trainer, step, state, prompt)
        if step in steps:
            noise = normal_like(state, keys[steps.index(step)], siblings)[0]
            mean, std = sde_mean(trainer, step, state, velocity)
            branches = mean + std * noise
            latents.append(state[0])
            next_latents.append(branches)
            log_probs.append(log_prob(branches, mean, std))
            images.append(finish(trainer, branches, step + 1, copies))
        state = ode_step(state, velocity, trainer.schedule, step)
    return (torch.stack(latents), torch.stack(next_latents), torch.stack(log_probs)), images


def velocity_at(trainer: Trainer, step: int, latents: Tensor, prompts: Conditioning) -> Tensor:
    """The policy's velocity of rows that are all at one step."""
    sigma = trainer.schedule.sigma_rows(torch.full((len(latents),), step), trainer.policy.device)
    return trainer.policy.velocity(latents, sigma, prompts)


def finish(trainer: Trainer, latents: Tensor, first_step: int, prompts: Conditioning) -> list[Image.Image]:
    """The ODE tail of K branches, decoded to PIL images."""
    with trainer.clock("tails"):
        for step in range(first_step, trainer.schedule.num_steps):
            latents = ode_step(latents, velocity_at(trainer, step, latents, prompts), trainer.schedule, step)
    with trainer.clock("decode"):
        pixels = trainer.policy.decode(latents).permute(0, 2, 3, 1).cpu().numpy()
        return [Image.fromarray(image) for image in pixels]


def sde_mean(trainer: Trainer, step: int, latents: Tensor, velocity: Tensor) -> tuple[Tensor, float]:
    """Mean and standard deviation of the stochastic step."""
    sde = trainer.schedule.sde
    return sde.x_coef[step].item() * latents + sde.v_coef[step].item() * velocity, sde.std[step].item()


def log_prob(next_latents: Tensor, mean: Tensor, std: float) -> Tensor:
    """(B,) mean over elements of the Gaussian's log-density."""
    distribution = torch.distributions.Normal(mean, std, validate_args=False)
    return distribution.log_prob(next_latents).flatten(1).mean(1)


def timed(judge: Judge, images: list[Image.Image], prompts: Sequence[Prompt]) -> tuple[Tensor, float]:
    """Scores on the CPU, and the seconds they took."""
    start = time.perf_counter()
    return judge(images, prompts).float().cpu(), time.perf_counter() - start


def collect(scores: list[Future]) -> tuple[Tensor, float]:
    """All scores in order, and the threads' seconds."""
    values, seconds = zip(*(future.result() for future in scores), strict=True)
    return torch.cat(values), sum(seconds)


def seed_advantages(rewards: Tensor, clip: float) -> Tensor:
    """(S, R, K) rewards normalised among the siblings of one noise and step."""
    centred = rewards - rewards.mean(2, keepdim=True)
    return (centred / (rewards.std(2, keepdim=True, correction=0) + STD_EPSILON)).clamp(-clip, clip)


def learn(trainer: Trainer, samples: Samples, advantages: Tensor, copies: int) -> Iterator[None]:
    """Accumulates the gradient of each optimizer step and yields when it is complete."""
    count, steps = samples.latents.shape[1] * trainer.method.siblings, forks_of(trainer)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(trainer.config.run.seed))
    micro_batches = order.split(copies)
    per_update = len(micro_batches) // trainer.config.learn.updates
    for number, branches in enumerate(micro_batches, 1):
        for fork in range(len(steps)):
            loss = copied_loss(trainer, samples, advantages, fork, branches)
            (loss / (per_update * len(steps))).backward()
        if number % per_update == 0:
            yield


def copied_loss(trainer: Trainer, samples: Samples, advantages: Tensor, fork: int, branches: Tensor) -> Tensor:
    """Loss of a micro-batch of copies: each row is one sibling, numbered within (R, K)."""
    policy, objective, step = trainer.policy, trainer.method.objective, forks_of(trainer)[fork]
    places = branches.to(policy.device)
    rows = places // trainer.method.siblings
    latents, prompts = samples.latents[fork][rows], samples.conditioning.rows(rows)
    next_latents, before = samples.next_latents[fork].flatten(0, 1)[places], samples.log_probs[fork].flatten()[places]
    mean, std = sde_mean(trainer, step, latents, velocity_at(trainer, step, latents, prompts))
    ratio = torch.exp(log_prob(next_latents, mean, std) - before)
    gain = objective.terms[step, WEIGHT].item() * advantages[fork].flatten()[branches].to(policy.device)
    clipped = ratio.clamp(1 - objective.clip, 1 + objective.clip)
    loss = torch.maximum(-gain * ratio, -gain * clipped).mean()
    if objective.kl:
        with torch.no_grad(), policy.reference():
            mean_ref, _ = sde_mean(trainer, step, latents, velocity_at(trainer, step, latents, prompts))
        loss = loss + objective.kl * ((mean - mean_ref) ** 2).mean() / (2 * std**2)
    return loss
