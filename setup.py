"""Packaging of tempflow. `tempflow_kernels` is a distribution of its own, `tempflow-kernels`, in the folder `kernels/`.

tempflow requires it by the path of that folder, so that `pip install -e .` needs no index that carries it, and so
that the import name has one owner: whoever installed `kernels/` before keeps one copy. For a wheel that leaves this
machine, set TEMPFLOW_RELEASE=1: the requirement is then the plain version.

The folder `kernels/` deliberately has no `__init__.py`: a package called `kernels` would be mistaken for the one of
that name which transformers and diffusers look for. Nothing here needs torch at build time.
"""

import os
from pathlib import Path

from setuptools import find_packages, setup

VERSION = "0.1.0"
KERNELS_FOLDER = Path(__file__).resolve().parent / "kernels"
release = os.environ.get("TEMPFLOW_RELEASE") == "1"
kernels = f"tempflow-kernels=={VERSION}" if release else f"tempflow-kernels @ {KERNELS_FOLDER.as_uri()}"

REWARDS = ["rapidocr>=3.10", "onnxruntime>=1.20", "rapidfuzz>=3.9", "httpx>=0.27", "aiohttp>=3.11"]
"""Besides torch and transformers. RapidOCR's wheel holds its models; nothing here needs torchvision."""

DOCS = ["zensical>=0.0.73"]
"""The successor of mkdocs-material, by its makers; reads mkdocs.yml."""

WANDB = ["wandb>=0.31"]

setup(
    name="tempflow",
    version=VERSION,
    description="TempFlow-GRPO: fast reinforcement learning of flow-matching image models",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["tempflow", "tempflow.*"]),
    package_data={
        "tempflow": [
            "settings/presets/**/*.yaml", "studies/shipped/*.yaml",
            "records/page/assets/**/*",
            "digits/*.safetensors", "digits/prompts/*.jsonl", "digits/pipeline/**/*",
            "scenes/*.safetensors", "scenes/prompts/*.jsonl", "scenes/pipeline/**/*",
        ],
    },
    install_requires=[
        kernels,
        "torch>=2.11",
        "diffusers>=0.42",
        "transformers>=5.0",
        "peft>=0.18",
        "safetensors>=0.5",
        "pydantic>=2.11",
        "pyyaml>=6",
        "numpy",
        "pillow",
        "matplotlib>=3.8",
        "jinja2>=3.1",
        "scipy>=1.11",
        "tensorboard>=2.16",
        "tqdm",
    ],
    extras_require={
        "test": [
            "bitsandbytes>=0.50",
            "hypothesis>=6.100",
            "playwright>=1.60",
            "pytest>=8",
            "pytest-benchmark>=5",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.6",
            "scikit-learn>=1.5",
            "triton>=3.6; platform_system == 'Linux'",
            *DOCS,
            *REWARDS,
            *WANDB,
        ],
        "digits": ["scikit-learn>=1.5"],
        "gpu": ["bitsandbytes>=0.49", "flash-attn>=2.8"],
        "docs": DOCS,
        "rewards": REWARDS,
        "wandb": WANDB,
        "trackio": ["trackio>=0.43"],
        "swanlab": ["swanlab>=0.10"],
    },
    entry_points={
        "console_scripts": ["tempflow=tempflow.__main__:program", "tempflow-train=tempflow.commands.train:program"],
    },
)
