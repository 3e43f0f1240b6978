"""A run in words and numbers, before it starts: who is compared with whom, what it computes, what it weighs."""

from __future__ import annotations

import torch
from tempflow_kernels import backend_info

from tempflow.explore.plan import BranchPlan
from tempflow.explore.schedule import NoiseSchedule
from tempflow.forecast.cost import BranchCost
from tempflow.forecast.memory import plan_memory
from tempflow.learn.optimizers import estimated_state_bytes
from tempflow.models.without_weights.skeleton import Skeleton
from tempflow.settings.checks import group_size
from tempflow.settings.fields import Config

ALIKE = {"seed": "one prompt, one initial noise, one fork", "prompt": "one prompt, one fork step, all its noises",
         "batch": "one fork step, all prompts"}  # fmt: skip


def explain(
    config: Config, skeleton: Skeleton, schedule: NoiseSchedule, plan: BranchPlan, ranks: int, device: str
) -> str:
    """The plan of an iteration and of the run, a line for each thing."""
    return "\n".join([
        _model(config, skeleton, ranks, device),
        *_arithmetic(config, plan, ranks),
        _forks(schedule, plan),
        f"cost per process: {_cost(config, skeleton, plan, ranks).describe(plan, skeleton.network_rows)}",
        _optimizer(config, skeleton),
    ])  # fmt: skip


def explain_memory(config: Config, skeleton: Skeleton, plan: BranchPlan, ranks: int) -> str:
    """Memory by part; takes seconds, for the network is rehearsed."""
    return plan_memory(config, skeleton, plan, ranks).describe()


def _model(config: Config, skeleton: Skeleton, ranks: int, device: str) -> str:
    trained, whole = (skeleton.parts[name].parameters for name in ("trainable", "transformer"))
    _, height, width = skeleton.image_shape
    operators = backend_info()["cuda" if device == "cuda" else "cpu"]
    return (
        f"tempflow: {config.model.path} on {ranks} x {device}, {width} x {height} pixels, latents "
        f"{tuple(skeleton.latent_shape)}; {trained:,} trained parameters ({config.model.train}) of {whole:,} in the "
        f"transformer; operators: {operators}"
    )


def _arithmetic(config: Config, plan: BranchPlan, ranks: int) -> list[str]:
    """How prompts become images, groups and optimizer steps, over all processes."""
    branch, learn = config.branch, config.learn
    trunks, forks = explore.prompts * explore.noises, len(plan.steps)
    images, size = trunks * forks * plan.siblings, group_size(config)
    steps, rows = learn.updates * learn.inner_epochs, trunks * forks // learn.updates
    passes = f", in {learn.inner_epochs} passes over them" if learn.inner_epochs > 1 else ""
    calls = rows // ranks // learn.rows
    return [
        f"an iteration: {explore.prompts} prompts x {explore.noises} seeds = {trunks} trunks; each forks at {forks} steps "
        f"into {plan.siblings} siblings = {images:,} branches, one image each; advantages among {size} branches "
        f"(credit.group={credit.group}: {ALIKE[credit.group]}), {images // size:,} groups",
        f"learning: {steps} optimizer steps an iteration{passes}; each takes {rows:,} network rows, with the "
        f"{rows * plan.siblings:,} branches that left them ({calls} calls of {learn.rows} rows per process)",
        f"the run: {learn.iterations:,} iterations, {steps * learn.iterations:,} optimizer steps, "
        f"{images * learn.iterations:,} images",
    ]


def _forks(schedule: NoiseSchedule, plan: BranchPlan) -> str:
    weights = schedule.noise_weights(plan.pool).tolist()
    drawn = f" ({len(plan.steps)} of them drawn each iteration)" if len(plan.steps) < len(plan.pool) else ""
    listed = ", ".join(f"{step}: {weight:.2f}" for step, weight in zip(plan.pool, weights, strict=True))
    return f"forks at steps (step: noise weight){drawn}: {listed}"


def _cost(config: Config, skeleton: Skeleton, plan: BranchPlan, ranks: int) -> BranchCost:
    branch, learn = config.branch, config.learn
    sizes = (torch.Size(shape).numel() for shape in (skeleton.latent_shape, skeleton.image_shape))
    passes = learn.inner_epochs * (2 if objective.kl else 1)
    return BranchCost.of(plan, explore.prompts * explore.noises // ranks, *sizes, passes)


def _optimizer(config: Config, skeleton: Skeleton) -> str:
    size = estimated_state_bytes(config.learn, skeleton.trainable_sizes)
    return f"optimizer: {config.learn.optimizer}, its state will be {size / 2**20:,.1f} MiB"
