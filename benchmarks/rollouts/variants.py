"""What `compare.py` compares, as data: every level adds its settings to those of the level before it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

EXACT, ROUNDING, APPROXIMATION = "exact", "rounding", "approximation"
"""The same operations on the same numbers; the same mathematics, rounded elsewhere; other rewards, but never other
log-probabilities or gradients."""


@dataclass(frozen=True)
class Variant:
    """One way of doing the same iteration."""

    name: str
    adds: str
    """what is new in it, in words"""
    settings: dict[str, Any] = field(default_factory=dict)
    """`section.field` -> value, in addition to those of the level before"""
    official: bool = False
    """the released algorithm instead of ours; does not hand its settings on"""
    exactness: str = ROUNDING
    """EXACT, ROUNDING or APPROXIMATION, against `ours`"""
    gpu_only: str = ""
    """why it says nothing on a CPU; empty if it does"""
    base: str = ""
    """the level whose settings it adds to; empty for the one before it"""

    @property
    def approximate(self) -> bool:
        return self.exactness == APPROXIMATION


@dataclass(frozen=True)
class Goal:
    """How many times as many rollouts per hour as `official` some variant of a list should reach."""

    times: float
    told: str
    variants: tuple[str, ...]


REFERENCE = "ours"
"""The variant whose rewards are the exact ones that the others' are compared with."""

EXACT_END = "+overlap"
"""The last of the exact levels that add up."""

FP32_ON_CPU = "on a CPU everything is fp32 and this is `official` again"
PLAIN = {"tails.level": "eager", "tails.merged": False}
"""The released algorithm makes no use of our tail engines: none are compiled, captured or kept in memory for it."""

VARIANTS = (
    Variant("official", "the released algorithm: nested loops at batch 6, siblings copied in training, fp32 decoder "
            "and scorer, PIL images",
            PLAIN | {"model.dtype": "fp32", "model.vae_dtype": "fp32", "model.attention": "native"}, official=True),
    Variant("official-tuned", "the same with bf16 weights, decoder and scorer, and the fastest attention",
            PLAIN | {"model.dtype": "bf16"}, official=True, gpu_only=FP32_ON_CPU),
    Variant(REFERENCE, "one network row per fork in learning, branches of all forks in chunks, scores from tensors",
            PLAIN | {"model.dtype": "bf16", "reward.overlap": False}, exactness=EXACT),
    Variant("+merged", "adapters merged into a copy of the weights for the tails", {"tails.merged": True}),
    Variant("+compile", "transformer blocks of the tails compiled", {"tails.level": "compile"}),
    Variant("+graph", "tails replayed as CUDA graphs", {"tails.level": "compiled_graph"},
            gpu_only="CUDA graphs need a GPU"),
    Variant(EXACT_END, "decoding and scoring beside the next chunk", {"reward.overlap": True},
            gpu_only="on a CPU with a scorer of its own it would only divide the cores"),
    Variant("+drop last", "tails end before the last, nearly empty step", {"tails.drop_below": 0.01},
            exactness=APPROXIMATION),
    Variant("+fp8", "the copy's large linear layers in 8 bits", {"tails.fp8": True}, exactness=APPROXIMATION,
            gpu_only="needs the 8-bit matrix products of a Hopper GPU"),
    Variant("+multistep", "strided tails: every second sigma, with DPM-Solver++(2M)",
            {"tails.solver": "dpmpp_2m", "tails.stride": 2}, exactness=APPROXIMATION),
    Variant("+light decoder", "rewards from a small decoder's images (random weights here: for speed alone)",
            {"tails.decoder": "{workshop}/light_decoder"}, exactness=APPROXIMATION),
    Variant("+guidance above", "tails are guided at sigma >= .5 only, one network row a branch below",
            {"tails.guidance_above": 0.5}, exactness=APPROXIMATION),
    Variant("+stride 3", "`+multistep` with every third sigma", {"tails.stride": 3}, exactness=APPROXIMATION,
            base="+multistep"),
    Variant("stride 2 alone", f"`{EXACT_END}` with tails that take every second sigma with Euler steps",
            {"tails.stride": 2}, exactness=APPROXIMATION, base=EXACT_END),
    Variant("compiled decoder", f"`{EXACT_END}` with the image decoder compiled", {"tails.compile_vae": True},
            base=EXACT_END),
    Variant("compiled learning", f"`{EXACT_END}` with the blocks of trunk and learning compiled",
            {"learn.compile": True}, base=EXACT_END),
    Variant("exact noise", f"`{EXACT_END}` with noise to the last bit that of a CPU, not by the GPU's fast functions",
            {"run.noise": "exact"}, base=EXACT_END, gpu_only="on a CPU noise is always exact"),
    Variant("autotune", f"`{EXACT_END}` with matrix kernels that the compiler has timed",
            {"tails.autotune": True}, base=EXACT_END, gpu_only="there are no such kernels for a CPU"),
)  # fmt: skip
GOALS = (
    Goal(2.3, "without any approximation", (EXACT_END, "compiled decoder", "compiled learning", "autotune")),
    Goal(4.0, "with approximations of rewards only", ("+fp8", "+multistep")),
    Goal(6.0, "with strided tails and the light decoder", ("+light decoder", "+guidance above")),
)
GOALS_OF, GOALS_CHIP = "sd35-medium-512", "H100"
"""The architecture and the chip that they are about."""
BY_WORTH = ("official", REFERENCE, EXACT_END, "+multistep", "+light decoder")
"""What is run once before all others: the baseline, the reference of rewards, and the variants of the goals."""


def worth(variant: Variant) -> int:
    """Its place among the first rounds; smaller is earlier, the order of VARIANTS decides among equals."""
    return BY_WORTH.index(variant.name) if variant.name in BY_WORTH else len(BY_WORTH)


def chain(variant: Variant) -> list[Variant]:
    """The levels that a variant consists of, itself last."""
    if variant.official or variant.name == REFERENCE:
        return [variant]
    names = [level.name for level in VARIANTS]
    before = VARIANTS[names.index(variant.base or names[names.index(variant.name) - 1])]
    return [*chain(before), variant]


def settings_of(variant: Variant, on_gpu: bool) -> dict[str, Any]:
    """All settings of a variant; on a CPU those of GPU levels are left out and everything stays in fp32."""
    merged: dict[str, Any] = {}
    for level in chain(variant):
        if on_gpu or not level.gpu_only:
            merged |= level.settings
    if not on_gpu:
        merged |= {"model.dtype": "fp32"}
    return merged
