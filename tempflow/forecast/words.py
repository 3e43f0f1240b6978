"""A run in words and numbers, before it starts: who is compared with whom, what it computes, what it weighs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from tempflow_kernels import backend_info

from tempflow.explore.schedule import NoiseSchedule
from tempflow.explore.tails.solver import tail_solvers
from tempflow.forecast.cost import IterationCost, Shape, iteration_cost, learning_passes
from tempflow.forecast.memory import plan_memory
from tempflow.learn.objective import WEIGHT
from tempflow.learn.optimizers import estimated_state_bytes
from tempflow.method import Method
from tempflow.models.without_weights.skeleton import Skeleton
from tempflow.settings.checks import group_size
from tempflow.settings.fields import Config

COMPARED = {"seed": "one prompt, one initial noise, one fork", "prompt": "one prompt, one fork, all its noises",
            "batch": "one fork, all prompts"}  # fmt: skip
DRAWN = {"iteration": "{take} of them drawn each iteration", "prompt": "{take} of them drawn for each prompt",
         "slide": "one after the other, each for {every} iterations"}  # fmt: skip


@dataclass(frozen=True)
class Forecast:
    """What is known of a run before anything is loaded."""

    config: Config
    skeleton: Skeleton
    method: Method
    schedule: NoiseSchedule
    ranks: int

    def cost(self) -> IterationCost:
        """Of one iteration of one process."""
        explore, passes = self.config.explore, learning_passes(self.config)
        sizes = (torch.Size(shape).numel() for shape in (self.skeleton.latent_shape, self.skeleton.image_shape))
        shape = Shape(explore.prompts * explore.noises // self.ranks, explore.siblings, *sizes, passes)
        return iteration_cost(self.method.rule, self.schedule, tail_solvers(self.config.tails), shape)

    def describe(self, device: str) -> str:
        """The plan of an iteration and of the run, a line for each thing."""
        return "\n".join([
            self._model(device),
            *self._arithmetic(),
            self._forks(),
            f"cost per process: {self.cost().describe(self.skeleton.network_rows)}",
            self._optimizer(),
            *self._light_decoder(),
        ])  # fmt: skip

    def describe_memory(self) -> str:
        """Memory by part; takes seconds, for the network is rehearsed."""
        return plan_memory(self.config, self.skeleton, self.cost(), self.ranks).describe()

    def memory(self) -> int:
        """Bytes of a process at the peak."""
        return plan_memory(self.config, self.skeleton, self.cost(), self.ranks).total

    def beside_tails(self, captured: bool) -> int:
        """Bytes that a call of the tails has to leave free (`MemoryPlan.beside_tails`)."""
        return plan_memory(self.config, self.skeleton, self.cost(), self.ranks).beside_tails(captured)

    def _model(self, device: str) -> str:
        config, skeleton = self.config, self.skeleton
        trained, whole = (skeleton.parts[name].parameters for name in ("trainable", "transformer"))
        _, height, width = skeleton.image_shape
        operators = backend_info()["cuda" if device == "cuda" else "cpu"]
        return (
            f"{config.model.path} on {self.ranks} x {device}, {width} x {height} pixels, latents "
            f"{tuple(skeleton.latent_shape)}; {trained:,} trained parameters ({config.model.train}) of {whole:,} in "
            f"the transformer; operators: {operators}"
        )

    def _arithmetic(self) -> list[str]:
        """How prompts become images, groups and optimizer steps, over all processes."""
        explore, learn, credit, rule = self.config.explore, self.config.learn, self.config.credit, self.method.rule
        trunks, branches = explore.prompts * explore.noises, self.method.branches(explore.prompts)
        tails, size = len(tail_solvers(self.config.tails)), group_size(self.config)
        window = f", {rule.window} stochastic steps each" if rule.window > 1 else ""
        images = "one image each" if tails == 1 else f"{tails} images each"
        return [
            f"an iteration: {explore.prompts} prompts x {explore.noises} noises = {trunks} trunks; each forks at "
            f"{rule.forks.take} steps into {explore.siblings} siblings{window} = {branches:,} branches, {images}; "
            f"advantages among {size} branches (credit.group={credit.group}: {COMPARED[credit.group]}), "
            f"{branches // size:,} groups",
            self._learning(branches),
            f"the run: {learn.iterations:,} iterations, {self._steps() * learn.iterations:,} optimizer steps, "
            f"{branches * tails * learn.iterations:,} images",
        ]

    def _steps(self) -> int:
        """Optimizer steps of one iteration."""
        learn, forks = self.config.learn, self.method.rule.forks.take
        return learn.updates * learn.inner_epochs * {"trunks": 1, "forks": forks}[learn.updates_by]

    def _learning(self, branches: int) -> str:
        """Optimizer steps, and the rows and branches that each of them takes."""
        learn, steps = self.config.learn, self._steps()
        cost, epochs = self.cost(), learn.inner_epochs
        rows = cost.learn_rows // (2 if self.config.objective.kl else 1) * self.ranks // steps
        passes = f", in {epochs} passes over them" if epochs > 1 else ""
        return (
            f"learning: {steps} optimizer steps an iteration{passes}; each takes {rows:,} network rows, with the "
            f"{branches * epochs // steps:,} branches that left them ({rows // self.ranks // learn.rows} calls of "
            f"{learn.rows} rows per process)"
        )

    def _forks(self) -> str:
        rule, config = self.method.rule, self.config
        terms, trained = self.method.objective.terms, rule.trained()
        listed = ", ".join(f"{step}: {terms[step, WEIGHT]:.2f}" for step in trained)
        drawn = DRAWN[rule.forks.draw].format(take=rule.forks.take, every=rule.forks.every)
        some = f" ({drawn})" if rule.forks.take < len(rule.forks.pool) else ""
        merged = {step: jump for step, jump in enumerate(rule.jumps) if jump > 1}
        jumps = f"; merged steps (step: sigmas spanned): {merged}" if merged else ""
        return (
            f"forks at steps {list(rule.forks.pool)}{some}; weights of trained steps "
            f"(objective.weighting={config.objective.weighting}): {listed}{jumps}"
        )

    def _light_decoder(self) -> list[str]:
        """What decodes for the rewards, where it is not the model's own decoder."""
        path, parts = self.config.tails.decoder, self.skeleton.parts
        if path is None:
            return []
        light, own = self.skeleton.light(path).parameters, parts["vae"].parameters
        return [f"rewards see images of the light decoder {path}, {light:,} parameters instead of {own:,}; evaluation, "
                f"gold and pictures those of the model's own"]  # fmt: skip

    def _optimizer(self) -> str:
        size = estimated_state_bytes(self.config.learn, self.skeleton.trainable_sizes)
        return f"optimizer: {self.config.learn.optimizer}, its state will be {size / 2**20:,.1f} MiB"
