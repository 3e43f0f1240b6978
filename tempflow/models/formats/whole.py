"""A whole pipeline folder, or its transformer alone, with the trained change in the weights.

Weights go from the base's files to the new ones tensor by tensor: what is changed is summed in fp32 and rounded once,
and no more than one file of the new folder is in memory.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from tempflow.models.formats.layouts import Changes, rounded
from tempflow.models.index import is_given
from tempflow.models.weights.files import INDEX, headers, read_json
from tempflow.models.weights.origin import Origin

FILE = "diffusion_pytorch_model{suffix}.safetensors"
"""as diffusers calls the weights of its own networks"""
SHARD = "5GB"
"""largest file of weights"""
KEPT = (".safetensors", ".json", ".txt", ".model", ".jinja", ".md")
"""ends of the files that a part of a pipeline needs"""
VARIANT = re.compile(r"\.(fp16|bf16|fp32|ema|non_ema)(-\d{5}-of-\d{5})?\.safetensors")
"""a second copy of the weights in another precision"""


@dataclass(frozen=True)
class Trained:
    """What training made of a transformer: low-rank changes of some weights, or new values."""

    changes: Changes
    values: dict[str, Tensor]
    """parameter -> its value, where all were trained"""

    def names(self) -> set[str]:
        return {f"{layer}.weight" for layer in self.changes} | set(self.values)

    def of(self, name: str, base: Tensor) -> Tensor:
        """The trained tensor, in fp32 where training has changed it, in place of the base's."""
        if name in self.values:
            return self.values[name]
        change = self.changes.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        return base if change is None else base.float() + change.up.float() @ change.down.float()


@dataclass(frozen=True)
class Source:
    """The files of a base's transformer."""

    folder: Path
    shapes: dict[str, tuple[int, ...]]
    places: dict[str, Path]
    """tensor -> its file"""

    def tensors(self, names: list[str]) -> Iterator[tuple[str, Tensor]]:
        """Tensors as they are stored, file by file."""
        held: dict[Path, list[str]] = {}
        for name in names:
            held.setdefault(self.places[name], []).append(name)
        for file, inside in held.items():
            with safe_open(file, "pt") as opened:
                yield from ((name, opened.get_tensor(name)) for name in inside)


def read_source(folder: Path, trained: Trained, origin: Origin) -> Source:
    """The files that hold a transformer's weights, second copies left aside.

    Raises:
        BadInput: they are not readable, or lack a tensor that was trained.
    """
    index = folder / f"diffusion_pytorch_model{INDEX}"
    used = set(read_json(index, origin)["weight_map"].values()) if index.is_file() else {FILE.format(suffix="")}
    shapes, places = {}, {}
    for file, found in headers(folder, origin):
        if file.name in used:
            shapes |= found
            places |= dict.fromkeys(found, file)
    missing = sorted(trained.names() - shapes.keys())
    if missing:
        raise origin.refusal(f"{folder.name} lacks {missing[0]}, which was trained; is it the model of this run?")
    return Source(folder, shapes, places)


def write_transformer(
    source: Source, trained: Trained, folder: Path, dtype: torch.dtype, shard: str | int = SHARD
) -> None:
    """Writes the transformer for `from_pretrained` into a new folder, in files of at most `shard` bytes.

    Raises:
        OSError: it cannot be written.
    """
    planned = {name: torch.empty(shape, dtype=dtype, device="meta") for name, shape in source.shapes.items()}
    plan = split_torch_state_dict_into_shards(planned, filename_pattern=FILE, max_shard_size=shard)
    folder.mkdir(parents=True)
    with tqdm(total=len(planned), desc="weights", unit="tensor", leave=False) as bar:
        for file, names in plan.filename_to_tensors.items():
            held = {}
            for name, base in source.tensors(names):
                held[name] = rounded(name, trained.of(name, base), dtype)
                bar.update()
            save_file(held, folder / file, metadata={"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / f"diffusion_pytorch_model{INDEX}").write_text(json.dumps(index, indent=1, sort_keys=True))
    shutil.copyfile(source.folder / "config.json", folder / "config.json")


def transformer_bytes(source: Source, dtype: torch.dtype) -> int:
    """What `write_transformer` will write."""
    return sum(torch.Size(shape).numel() for shape in source.shapes.values()) * dtype.itemsize


def other_files(base: Path, index: dict) -> list[Path]:
    """What a pipeline needs besides its transformer, relative to its folder."""
    parts = [name for name, value in index.items() if name != "transformer" and is_given(value)]
    files = [file for name in parts for file in sorted((base / name).rglob("*")) if _is_needed(file)]
    licences = [file for file in sorted(base.glob("LICENSE*")) if file.is_file()]
    return [file.relative_to(base) for file in (base / "model_index.json", *licences, *files)]


def _is_needed(file: Path) -> bool:
    return file.is_file() and file.suffix in KEPT and not VARIANT.search(file.name)


def copy_files(base: Path, files: list[Path], folder: Path, told: Callable[[list[Path]], Iterator[Path]]) -> None:
    """Copies files of a base into a folder, links followed."""
    for file in told(files):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(base / file, folder / file)
