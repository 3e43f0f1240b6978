"""What every feature needs beyond what is always installed, and the line that brings it."""

from __future__ import annotations

import importlib.util
import shutil
from dataclasses import dataclass

REWARDS, GPU = "pip install 'tempflow[rewards]'", "pip install 'tempflow[gpu]'"

TRACKERS = ("wandb", "trackio", "swanlab")
"""Those whose packages are not always installed."""


@dataclass(frozen=True)
class Feature:
    """Something that works once its packages and programs are there."""

    name: str
    modules: tuple[str, ...]
    line: str
    """what to type"""
    programs: tuple[str, ...] = ()
    """one of them is enough"""
    gpu: bool = False
    """of use on a GPU only"""

    def missing(self) -> list[str]:
        """The packages, and the program, that are not there."""
        absent = [module for module in self.modules if not importable(module)]
        found = not self.programs or any(shutil.which(program) for program in self.programs)
        return absent if found else [*absent, " or ".join(self.programs)]


FEATURES = (
    Feature("scorer ocr", ("rapidocr", "onnxruntime", "rapidfuzz"), REWARDS),
    Feature("scorer vlm_judge", ("httpx",), REWARDS),
    Feature("scorer hpsv3, its instruction text", ("hpsv3",), "pip install --no-deps hpsv3"),
    Feature("scorers on other machines", ("aiohttp",), REWARDS),
    Feature("8-bit and paged optimizers", ("bitsandbytes",), GPU),
    Feature("attention flash", ("flash_attn",), GPU, gpu=True),
    Feature("operators in Triton", ("triton",), "pip install triton", gpu=True),
    Feature("compiled blocks, operators in C++", (), "apt-get install g++ cmake", programs=("c++", "g++", "clang++")),
    Feature("FLUX.2-dev, its text processor", ("torchvision",), "pip install torchvision"),
    *(Feature(f"tracker {name}", (name,), f"pip install 'tempflow[{name}]'") for name in TRACKERS),
    Feature("the documents as a site", ("zensical",), "pip install 'tempflow[docs]'"),
    Feature("tempflow audit, known faults", ("pip_audit",), "pip install pip-audit"),
    Feature("making the digits anew", ("sklearn",), "pip install 'tempflow[digits]'"),
    Feature("the tests", ("pytest", "hypothesis", "pytest_timeout"), "pip install 'tempflow[test]'"),
)

NEEDED = ("torch", "tempflow_kernels", "diffusers", "transformers", "peft", "safetensors", "pydantic", "yaml", "numpy",
          "PIL", "matplotlib", "jinja2", "scipy", "tensorboard", "tqdm")  # fmt: skip
"""Packages without which nothing works."""


def importable(module: str) -> bool:
    """Whether there is such a module; it is not imported."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False
