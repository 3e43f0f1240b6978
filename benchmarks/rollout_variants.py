"""What `rollouts.py` compares, as data: every level adds its settings to those of the level before it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


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
    exact: bool = True
    """rewards are those of the plain computation, up to rounding of the precision"""
    gpu_only: str = ""
    """why it says nothing on a CPU; empty if it does"""


GPU_DTYPES = {"model.dtype": "bf16"}

VARIANTS = (
    Variant("official", "released algorithm: nested loops at batch 6, siblings copied in training, fp32 decoder and "
            "scorer, PIL images", {"model.dtype": "fp32"}, official=True),
    Variant("official-tuned", "the same algorithm with bf16 weights, decoder and scorer, and the fastest attention",
            GPU_DTYPES, official=True, gpu_only="on a CPU it is `official`: fp32 is the fastest there"),
    Variant("ours", "one row per fork in learning, branches of all forks in one chunk, scores from tensors",
            {**GPU_DTYPES, "branch.overlap": False}),
)  # fmt: skip


def settings_of(variant: Variant, on_gpu: bool) -> dict[str, Any]:
    """All settings of a variant: those of the levels up to it; on a CPU everything stays in fp32."""
    levels = [level for level in VARIANTS if not level.official]
    chain = [variant] if variant.official else levels[: levels.index(variant) + 1]
    merged: dict[str, Any] = {}
    for level in chain:
        merged |= level.settings
    if not on_gpu:
        merged.pop("model.dtype", None)
    return merged
