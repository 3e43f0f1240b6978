"""The part of the packaging that is a decision: which wheel is built. Everything else stands in pyproject.toml.

    pip install ./kernels          or          pip install "git+URL#subdirectory=kernels"

With a C++ compiler the wheel carries the C++ twin and is one of this platform; without one, or with
TEMPFLOW_KERNELS_PURE=1, it is the pure one (py3-none-any). `tempflow` requires this distribution instead of carrying a
copy, so that the import name has one owner.
"""

import sys
from pathlib import Path

from setuptools import setup

sys.path.insert(0, str(Path(__file__).resolve().parent))

from native_build import BuildNative, HonestWheel, native_modules

setup(ext_modules=native_modules(), cmdclass={"build_ext": BuildNative, "bdist_wheel": HonestWheel})
