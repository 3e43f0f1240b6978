"""Packaging of tempflow_kernels alone (distribution `tempflow-kernels`): torch, triton where there is one, no more.

    pip install ./kernels          or          pip install "git+URL#subdirectory=kernels"

`tempflow` requires this distribution instead of carrying a copy, so that the import name has one owner.
"""

import sys
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from native_build import NATIVE, BuildNative, PlatformWheel  # noqa: E402 - this file is not on the path by itself

setup(
    name="tempflow-kernels",
    version="0.1.0",
    description="Fused transition and loss kernels for reinforcement learning of flow-matching models",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.11",
    packages=["tempflow_kernels", *(f"tempflow_kernels.{name}" for name in ("compat", "cpu", "gpu", "plain"))],
    package_data={"tempflow_kernels": ["csrc/*.h", "csrc/*.cpp"]},
    install_requires=["torch>=2.11"],
    extras_require={"triton": ["triton>=3.6; platform_system == 'Linux'"]},
    ext_modules=[NATIVE],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": PlatformWheel},
)
