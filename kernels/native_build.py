"""Building the C++ twin during installation: CMake if it is there, else the compiler alone, else not at all.

Used by `kernels/setup.py`. Nothing here imports torch. A failure never fails the installation: without the library
plain torch serves CPU tensors, and `tempflow_kernels.backend_info()` says so. The wheel's tag follows what was built.
TEMPFLOW_KERNELS_PURE=1 leaves the library out on purpose.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path

from setuptools import Extension
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).resolve().parent
SOURCES = HERE / "tempflow_kernels" / "csrc"
FLAGS = ("-std=gnu++17", "-O3", "-fPIC", "-ffp-contract=off", "-fno-math-errno", "-w")
AVX512 = ("-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mfma", "-mprefer-vector-width=512")
LIBRARY = Path("tempflow_kernels", "cpu", "_native.so")


def native_modules() -> list[Extension]:
    """The C++ twin for `setup(ext_modules=...)`; nothing where the pure wheel was asked for.

    Raises:
        ValueError: TEMPFLOW_KERNELS_PURE is neither 0 nor 1.
    """
    pure = os.environ.get("TEMPFLOW_KERNELS_PURE") or "0"
    if pure not in ("0", "1"):
        raise ValueError(f"TEMPFLOW_KERNELS_PURE: found {pure!r}, expected 0 or 1")
    return [] if pure == "1" else [Extension("tempflow_kernels.cpu._native", sources=[], optional=True)]


def compiler() -> str | None:
    """The C++ compiler: $CXX, or the first of the usual names."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    return next(filter(None, map(shutil.which, names)), None)


def _run(*command: object) -> None:
    subprocess.run([str(part) for part in command], check=True)


def build_with_cmake(target: Path, scratch: Path) -> None:
    """Configure and build `kernels/CMakeLists.txt`; the library ends up at `target`."""
    _run("cmake", "-S", HERE, "-B", scratch, "-DCMAKE_BUILD_TYPE=Release", "-DBUILD_TESTING=OFF")
    _run("cmake", "--build", scratch, "--config", "Release")
    shutil.copyfile(scratch / "_native.so", target)


def build_with_compiler(target: Path, scratch: Path) -> None:
    """The same library without CMake."""
    is_x86 = platform.machine().lower() in ("x86_64", "amd64")
    variants = {"generic": ()} | ({"avx2": ("-mavx2", "-mfma"), "avx512": AVX512} if is_x86 else {})
    base = [compiler(), *FLAGS, *(["-DTEMPFLOW_X86"] if is_x86 else [])]
    objects = []
    for name, options in variants.items():
        objects.append(scratch / f"blocks_{name}.o")
        macros = (f"-DTEMPFLOW_NAME={name}", f"-DTEMPFLOW_OPS={name}_ops")
        _run(*base, *options, *macros, "-c", SOURCES / "blocks.cpp", "-o", objects[-1])
    _run(*base, "-shared", "-pthread", SOURCES / "transition.cpp", SOURCES / "loss.cpp", *objects, "-o", target)


class BuildNative(build_ext):
    """Builds the library, or says in one line that it did not."""

    def get_ext_filename(self, fullname: str) -> str:
        """A plain library without a Python tag: it knows nothing of Python."""
        return os.path.join(*fullname.split(".")) + ".so"

    def build_extension(self, ext: Extension) -> None:
        """Never raises for want of a compiler: see the module docstring."""
        target, scratch = Path(self.get_ext_fullpath(ext.name)), Path(self.build_temp).resolve() / "native"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)  # one of an earlier build must not pass for the result of this one
        scratch.mkdir(parents=True, exist_ok=True)
        if compiler() is None:
            print("tempflow_kernels: no C++ compiler found; plain torch will serve CPU tensors")
            return
        build = build_with_cmake if shutil.which("cmake") else build_with_compiler
        try:
            build(target.resolve(), scratch)
            print(f"tempflow_kernels: built {target.name}; the C++ twin will serve CPU tensors")
        except (OSError, subprocess.CalledProcessError) as error:
            print(f"tempflow_kernels: the C++ build failed ({error}); plain torch will serve CPU tensors")


class HonestWheel(bdist_wheel):
    """A wheel for any Python; for any platform too if the library is not in it."""

    def get_tag(self) -> tuple[str, str, str]:
        """py3-none-PLATFORM with the library, which has no Python interface, else py3-none-any.

        setuptools asks after the files were laid out in `bdist_dir` and before it writes Root-Is-Purelib.
        """
        self.root_is_pure = not Path(self.bdist_dir, LIBRARY).is_file()
        return "py3", "none", "any" if self.root_is_pure else super().get_tag()[2]
