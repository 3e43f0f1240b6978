"""Which normals the Triton kernels draw: the one setting, for the whole process.

| mode | normals |
|---|---|
| fast | by the GPU's own logarithm, root, sine and cosine: within 1e-5 of the exact ones, half the instructions |
| exact | by polynomials: equal to those of the C++ twin bit for bit |

The default is `fast`, in Triton's interpreter `exact`. TEMPFLOW_KERNELS_NOISE, read at import, and `use_noise` change
it. On CPUs the normals are always exact. Whoever keeps keys and draws their noise again, as the loss does with the
step's, must do both in one mode; an operator that is recorded in a CUDA graph keeps the mode it was recorded in.
"""

from __future__ import annotations

import os

MODES = ("exact", "fast")


def _checked(name: str, mode: object) -> str:
    if mode not in MODES:
        raise ValueError(f"{name}: found {mode!r}, expected {' or '.join(MODES)}")
    return str(mode)


def _at_import() -> str:
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return _checked("TEMPFLOW_KERNELS_NOISE", os.environ.get("TEMPFLOW_KERNELS_NOISE") or MODES[not interpreted])


_mode = _at_import()


def use_noise(mode: str) -> None:
    """From now on the Triton kernels draw `exact` or `fast` normals.

    Raises:
        ValueError: another mode.
    """
    global _mode
    _mode = _checked("mode", mode)


def noise_mode() -> str:
    """The mode in which Triton kernels draw: `exact` or `fast`."""
    return _mode


def expect_noise_mode(forward: str) -> None:
    """Refuse to differentiate a loss with other noise than it was computed with.

    Raises:
        RuntimeError: the mode has changed since; an empty `forward` says nothing of it.
    """
    if forward and forward != _mode:
        raise RuntimeError(f"noise mode: found {_mode} in the backward, expected {forward} as in the forward")
