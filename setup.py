"""Packaging of tempflow: two import names, `tempflow` and `tempflow_kernels`.

The folder `kernels/` deliberately has no `__init__.py`: a package called `kernels` would be mistaken for the one of
that name which transformers and diffusers look for. Nothing here needs torch at build time.
"""

from pathlib import Path

from setuptools import find_packages, setup

KERNELS = "tempflow_kernels"
kernel_packages = [KERNELS] + [f"{KERNELS}.{name}" for name in find_packages(f"kernels/{KERNELS}")]

setup(
    name="tempflow",
    version="0.1.0",
    description="TempFlow-GRPO: fast reinforcement learning of flow-matching image models",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["tempflow", "tempflow.*"]) + kernel_packages,
    package_dir={"tempflow": "tempflow", KERNELS: f"kernels/{KERNELS}"},
    package_data={
        "tempflow": ["presets/*.yaml", "digits/*.safetensors", "digits/prompts/*.jsonl", "digits/pipeline/**/*"],
    },
    install_requires=[
        "torch>=2.11",
        "diffusers>=0.42",
        "transformers>=4.57",
        "peft>=0.18",
        "safetensors>=0.5",
        "pydantic>=2.11",
        "pyyaml>=6",
        "numpy",
        "pillow",
        "matplotlib>=3.8",
        "tensorboard>=2.16",
        "tqdm",
    ],
    extras_require={
        "test": ["pytest>=8", "pytest-benchmark>=5", "hypothesis>=6", "scikit-learn>=1.5", "triton>=3.6; platform_system == 'Linux'"],
        "digits": ["scikit-learn>=1.5"],
        "gpu": ["bitsandbytes>=0.49", "flash-attn>=2.8"],
        "rewards": [],
        "wandb": ["wandb"],
    },
    entry_points={"console_scripts": ["tempflow-train=tempflow.train:main"]},
)
