"""The C++ library: finding it, loading it, and the C structures of `csrc/tempflow_kernels.h`."""

from __future__ import annotations

import ctypes
import functools
import os
from ctypes import POINTER, byref, c_char_p, c_double, c_int, c_int64, c_uint32, c_void_p
from pathlib import Path

ABI_VERSION = 3
FILE_NAME = "_native.so"


class Array(ctypes.Structure):
    """tfk_array"""

    _fields_ = (("data", c_void_p), ("type", c_int64))


class Batch(ctypes.Structure):
    """tfk_batch"""

    _fields_ = (
        ("coef", c_void_p), ("key", c_void_p),
        ("rows", c_int64), ("siblings", c_int64), ("elements", c_int64), ("threads", c_int64),
    )  # fmt: skip


class Branches(ctypes.Structure):
    """tfk_branches"""

    _fields_ = (
        ("velocity", Array), ("velocity_old", Array), ("velocity_ref", Array), ("noise", Array),
        ("terms", c_void_p), ("kl_coef", c_double),
    )  # fmt: skip


_BATCH, _BRANCHES = POINTER(Batch), POINTER(Branches)
SIGNATURES = {
    "tfk_normal": (_BATCH, c_void_p),
    "tfk_transition_step": (_BATCH, Array, Array, Array, c_double, c_void_p, c_void_p),
    "tfk_transition_log_prob": (_BATCH, Array, Array, Array, c_void_p),
    "tfk_transition_log_prob_gradient": (_BATCH, Array, Array, Array, c_void_p, c_void_p, c_int64),
    "tfk_log_ratio": (_BATCH, _BRANCHES, c_void_p),
    "tfk_branch_loss": (_BATCH, _BRANCHES, c_void_p, c_double, c_double, c_void_p, c_void_p, c_void_p),
    "tfk_branch_loss_gradient": (_BATCH, _BRANCHES, c_void_p, c_double, c_double, c_void_p, c_void_p, c_void_p),
    "tfk_velocity_gradient": (_BATCH, _BRANCHES, c_void_p, c_double, c_void_p, c_int64),
}


def path() -> Path:
    """Where the library is expected; TEMPFLOW_KERNELS_LIBRARY points elsewhere."""
    return Path(os.environ.get("TEMPFLOW_KERNELS_LIBRARY") or Path(__file__).with_name(FILE_NAME))


@functools.cache
def library() -> ctypes.CDLL:
    """The loaded library.

    Raises:
        RuntimeError: it was not built (no compiler at installation) or is of another version.
    """
    if not path().is_file():
        raise RuntimeError(f"no C++ library at {path()}: install tempflow_kernels where CMake and a C++ compiler are")
    loaded = ctypes.CDLL(str(path()))
    found = loaded.tfk_abi_version()
    if found != ABI_VERSION:
        raise RuntimeError(f"C++ library {path()}: found interface {found}, expected {ABI_VERSION}; reinstall")
    for name, argument_types in SIGNATURES.items():
        getattr(loaded, name).argtypes, getattr(loaded, name).restype = argument_types, c_int
    loaded.tfk_instruction_set.restype = c_char_p
    loaded.tfk_philox4x32.argtypes = (POINTER(c_uint32),) * 3
    return loaded


def available() -> bool:
    """Whether the library was built. A library that is there but does not load is an error, not an absence."""
    return path().is_file()


def describe() -> str:
    """One line about the library, for `backend_info`."""
    if not available():
        return f"not built (no file {path()})"
    return f"{library().tfk_instruction_set().decode()}, {path()}"


def call(name: str, batch: Batch, *arguments) -> None:
    """Run one function of the library.

    Raises:
        MemoryError: it reported failure; with checked arguments only memory can be missing.
    """
    if getattr(library(), name)(byref(batch), *arguments) != 0:
        raise MemoryError(f"{name} failed: no memory for its partial sums")


__all__ = ["Array", "Batch", "Branches", "available", "byref", "call", "describe", "library", "path"]
