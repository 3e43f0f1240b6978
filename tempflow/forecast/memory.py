"""What a run will hold in a GPU's memory, part by part, before any weight is loaded.

Parts that stay: counted from the model's configuration and the settings, exactly. Parts that come and go: rehearsed
operator by operator without data (`models/without_weights/`); phases do not meet, so the largest one decides.

    weights            frozen: model.dtype; trained: fp32, and with model.train=full they are the whole transformer
    merged copy        model.dtype, of the adapted layers (of everything with full training), where tails use one
    reference          model.dtype, a copy of everything; only with full training and objective.kl
    moving average     fp32, as the trained parameters
    optimizer state    `tempflow.learn.optimizers.estimated_state_bytes`; paged states may move to the host
    gradients          fp32, from the first batch of an update to its step; a bucket twice while ranks average them
    decisions          latents and velocities of every stochastic step, fp32: a fork's, later in a window each sibling's
    branches           where they leave their windows, and where each of their tails ends, fp32
    text encoders      beside all else, or with model.offload_text only while new prompts are encoded
    learning           one batch: what its forward pass keeps, and the peak of its backward pass
    tails, decoding    one chunk's network call and one decoder call; they meet with reward.overlap
    captured tails     that network call where CUDA graphs hold it: they never give their memory back; evaluation's,
                       with adapters that are not merged, shares it
    evaluation         its calls before they are captured, beside the captured ones
    CUDA               1 GiB for context, libraries, workspaces

With parallel.shard: shares of weights, reference, average, optimizer state and gradients, which with parallel.offload
lie in main memory. The merged copy, whole or in shares, is one of everything. A call gathers two blocks and what is
around them in model.dtype; its backward pass holds the gradients of two blocks beside them.

Scorers are not counted: their weights are known to them alone.
"""

from __future__ import annotations

from dataclasses import dataclass

from tempflow.common.precision import DTYPES
from tempflow.forecast.cost import IterationCost
from tempflow.forecast.sharing import read_sharing
from tempflow.learn.optimizers import estimated_state_bytes
from tempflow.models.without_weights.peaks import DryModel
from tempflow.models.without_weights.skeleton import Skeleton
from tempflow.parallel.ranks import BUCKET
from tempflow.settings.fields import Config

CUDA = 2**30
CAPTURED = ("auto", "graph", "compiled_graph")
"""values of tails.level that end in CUDA graphs on a GPU"""
AUTO_ROWS = 32
"""what tails.rows=auto is planned with; on the GPU it takes what memory allows"""


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes by part."""

    stays: dict[str, int]
    phases: dict[str, dict[str, int]]
    """phase -> part -> bytes, beside what stays"""
    compared: dict[str, int]
    """learning's activations under the other choice of model.gradient_checkpointing"""

    @property
    def peak_phase(self) -> str:
        return max(self.phases, key=lambda phase: sum(self.phases[phase].values()))

    @property
    def total(self) -> int:
        """The peak of the whole run."""
        return sum(self.stays.values()) + sum(self.phases[self.peak_phase].values())

    def beside_tails(self, captured: bool) -> int:
        """What a call of the tails has to leave free of what is free when weights, average and scorers are there.

        Args:
            captured: CUDA graphs hold the call: its memory is there no less while the policy learns.
        """
        sizes = {name: sum(parts.values()) for name, parts in self.phases.items()}
        sizes["tails"] -= self.phases["tails"]["tail chunk"]
        return self.stays["optimizer state"] + (max(sizes.values()) if captured else sizes["tails"])

    def describe(self) -> str:
        """The plan as lines of text."""
        lines = [f"memory per process, estimated: {_gib(self.total)} at the peak, which is {self.peak_phase}"]
        lines += _table("stays", self.stays)
        for phase, parts in self.phases.items():
            lines += _table(phase, parts)
        lines += [f"  {name}: {_gib(size)}" for name, size in self.compared.items()]
        lines.append("  not counted: scorers on the same GPU")
        return "\n".join(lines)


def plan_memory(config: Config, skeleton: Skeleton, cost: IterationCost, ranks: int = 1) -> MemoryPlan:
    """The plan of one process whose iterations have that `cost`."""
    sharing = read_sharing(config, skeleton, ranks)
    dry = DryModel(skeleton, config.model, gathered=sharing.shared)
    learn, checkpointing = config.learn, config.model.gradient_checkpointing
    parts, trainable = skeleton.parts, skeleton.parts["trainable"].bytes
    text, states, branches = parts["text"].bytes, cost.state_bytes, cost.branch_bytes
    departures = branches * cost.trunks * cost.forks * cost.siblings // (cost.trunks * cost.forks * cost.siblings
                                                                         + cost.images)  # fmt: skip
    asked = AUTO_ROWS if config.tails.rows == "auto" else config.tails.rows
    chunk = min(asked, cost.trunks * cost.forks * cost.siblings)
    trunk_call, exact_call = dry.sampling(learn.rows).peak, dry.sampling(chunk).peak
    tail_call = dry.sampling(chunk, merged=True).peak if config.tails.merged else exact_call
    decode = dry.decoding(config.reward.rows).peak
    with_reference = config.objective.kl > 0
    batch = {choice: _learning(dry, learn.rows, choice, with_reference, trunk_call) for choice in (False, True)}
    encoding = {"encoding": {"text encoders": text}} if config.model.offload_text else {}
    averaging = {"averaging": min(BUCKET, trainable)} if ranks > 1 and not sharing.shared else {}
    evaluated = config.prompts.test is not None
    captured = max(tail_call, exact_call * (evaluated and not sharing.shared)) if config.tails.level in CAPTURED else 0
    gathered, reduced = {"gathered blocks": sharing.gathered}, {"gradients of blocks": sharing.reduced}
    other = "without" if checkpointing else "with"
    return MemoryPlan(
        stays={
            "weights": sharing.of(parts["transformer"].bytes),
            "merged copy": sharing.merged(skeleton, DTYPES[config.model.dtype].itemsize) if config.tails.merged else 0,
            "reference": sharing.of(_reference(config, skeleton)),
            "moving average": sharing.of(trainable),
            "optimizer state": sharing.of(estimated_state_bytes(learn, skeleton.trainable_sizes)),
            "text encoders": 0 if config.model.offload_text else text,
            "image decoder": parts["vae"].bytes,
            "light decoder": skeleton.light(config.tails.decoder).bytes,
            "captured tails": captured,
            "CUDA": CUDA,
        },
        phases=encoding | {
            "trunk": {"decisions": states, "network call": trunk_call} | gathered,
            "tails": {"decisions": states, "branches": branches, "tail chunk": 0 if captured else tail_call,
                      "decoding": decode} | ({} if sharing.whole_tails else gathered),
            "learning": {"decisions": states, "branches": departures, "gradients": sharing.of(trainable),
                         "batch": batch[checkpointing]} | averaging | gathered | reduced,
        } | ({"evaluation": {"network call": exact_call} | gathered} if evaluated else {}),
        compared={f"a learning batch {other} gradient checkpointing": batch[not checkpointing]},
    )  # fmt: skip


def _learning(dry: DryModel, rows: int, checkpointing: bool, reference: bool, forward: int) -> int:
    """Peak of a batch: its backward pass, or a reference call beside what its forward pass keeps."""
    peak = dry.learning(rows, checkpointing)
    return max(peak.peak, peak.kept + forward if reference else 0)


def _reference(config: Config, skeleton: Skeleton) -> int:
    if config.model.train == "lora" or not config.objective.kl:
        return 0
    return skeleton.parts["trainable"].parameters * DTYPES[config.model.dtype].itemsize


def _table(title: str, parts: dict[str, int]) -> list[str]:
    shown = ", ".join(f"{name} {_gib(size)}" for name, size in parts.items() if size)
    return [f"  {title}: {_gib(sum(parts.values()))} = {shown}"]


def _gib(size: int) -> str:
    """Bytes in the unit that suits them."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**27 else f"{size / 2**20:.1f} MiB"
