"""Settings of the tails, by which branches travel to their images."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from tempflow.settings.declare import Count, Fraction, changeable, section


@section
class TailConfig:
    rows: Count | Literal["auto"] = changeable(128)
    """Branches that travel together, in one network call a step, per process; auto measures which size is fastest."""
    level: Literal["auto", "eager", "graph", "compile", "compiled_graph"] = changeable("auto")
    """How tails call the network: as trunks do, captured in a CUDA graph, with compiled blocks, or both; auto takes
    the last that works on a GPU, and eager on a CPU."""
    merged: bool = True
    """Tails use a second copy of the weights with the adapters merged in; evaluation never does."""
    fp8: bool = False
    """The copy's large linear layers in 8-bit floating point, on GPUs that have it (Hopper, Ada and newer), where
    tails.level compiles (approximate)."""
    solver: Literal["euler", "dpmpp_2m", "adams_2"] = "euler"
    """Solver of the tails' ODE; the other two are of second order. Trunk and evaluation always take Euler steps."""
    stride: Count | Annotated[list[Count], Field(min_length=1)] = 1
    """Sigmas of the schedule that a tail's step spans; a list carries and scores every branch once for each."""
    drop_below: Fraction = 0.0
    """Tails take no step from a sigma below this (SD3.5's last one of ten is .0089), but end one step earlier."""
    guidance_above: Fraction = 0.0
    """Tails use guidance from this sigma on; below, conditional network rows alone, at half the cost (approximate)."""
    autotune: bool = changeable(False)
    """Compiled blocks choose among more kernels by timing them: minutes of set-up; other rounding."""
    check: bool = changeable(False)
    """Before the first iteration, tell what these settings change in the rewards of one iteration's branches."""
    decoder: str | None = None
    """Folder or hub id of a light decoder (TAESD's class), for rewards only, never evaluation or gold (approximate)."""
    compile_vae: bool = changeable(False)
    """Compile the image decoder, and a light one: exact but for rounding."""
