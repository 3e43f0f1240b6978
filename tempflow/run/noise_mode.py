"""Exact or fast noise: one choice for all processes of a run, which a resumed run keeps.

The GPU kernels draw normals by polynomials, the same bits as on a CPU, or by the hardware's functions, which differ by
about 1e-5. Step and loss always draw alike; what is kept across a resume is that old and new branches do.
"""

from __future__ import annotations

import os

import tempflow_kernels
import torch

from tempflow.common.errors import BadInput
from tempflow.common.say import say
from tempflow.parallel.ranks import Ranks

MODES = ("exact", "fast")
VARIABLE = "TEMPFLOW_KERNELS_NOISE"


def choose_mode(setting: str, saved: str | None, device: torch.device) -> str:
    """`exact` or `fast`.

    Args:
        setting: run.noise. saved: the mode of the checkpoint that the run goes on from, if there is one.
    Raises:
        BadInput: fast noise on a device that has none.
    """
    possible = MODES if device.type == "cuda" else MODES[:1]
    if setting != "auto" and setting not in possible:
        raise BadInput("run.noise", setting, "a CPU draws exact noise only; use run.noise=auto")
    wishes = [setting] if setting != "auto" else [saved, os.environ.get(VARIABLE), "fast"]
    mode = next((wish for wish in wishes if wish in possible), "exact")
    if saved is not None and mode != saved:
        say(f"run.noise={mode}: the checkpoint was learnt with {saved} noise")
    return mode


def settle_mode(setting: str, saved: str | None, ranks: Ranks) -> str:
    """Chooses, and from now on every kernel of this process draws so.

    Raises:
        BadInput: as above; or the processes would not draw alike.
    """
    mode = choose_mode(setting, saved, ranks.device)
    everyone = ranks.gather(torch.tensor([MODES.index(mode)]), 0)
    if everyone.min() != everyone.max():
        raise BadInput("run.noise", setting, f"processes differ in {VARIABLE}; set run.noise=exact or fast")
    tempflow_kernels.use_noise(mode)
    return mode
