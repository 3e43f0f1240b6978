"""What the folder of a model's part may hold, seen before any library reads it.

Weights are safetensors and nothing else. A library follows whatever file an index names, and code that a configuration
names; so indexes and configurations are read here first. Files beside them that are never read (`*.bin`) may lie there.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from tempflow.models.weights.origin import Origin

INDEX = ".safetensors.index.json"
SUFFIX = ".safetensors"
CODE = ("auto_map", "custom_pipelines", "trust_remote_code")
"""Entries of a configuration that name code, or ask for it"""
INTEGERS = ("position_ids", "num_batches_tracked")
"""Ends of the names of tensors that hold whole numbers"""

Shapes = dict[str, tuple[int, ...]]


def check_files(folder: Path, origin: Origin) -> None:
    """Looks through a part's folder.

    Raises:
        BadInput: an index that names anything but safetensors files of its own folder, a configuration that names code,
            quantised weights, or adapters that a library would add on its own account.
    """
    for file in sorted(folder.glob("*.json")):
        content = read_json(file, origin)
        if file.name.endswith(INDEX):
            _check_index(file, content, origin)
        elif file.name.endswith("config.json"):
            check_code(file, content, origin)
            if content.get("quantization_config"):
                raise origin.refusal(f"{_place(file)}: its weights are quantised; give the model before that")
    if (folder / "adapter_config.json").exists():
        raise origin.refusal(f"{folder.name}/adapter_config.json would add adapters to this part; remove it")


def read_json(file: Path, origin: Origin) -> dict[str, Any]:
    """The object of a JSON file.

    Raises:
        BadInput: it cannot be read, or holds something else.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:100]
        raise origin.refusal(f"{_place(file)} is no readable JSON ({reason})") from error
    if not isinstance(content, dict):
        raise origin.refusal(f"{_place(file)} holds no JSON object")
    return content


def check_code(file: Path, content: dict[str, Any], origin: Origin) -> None:
    """Refuses a configuration that names code to run."""
    named = [entry for entry in CODE if content.get(entry)]
    if named:
        raise origin.refusal(f"{_place(file)} names code to run ({named[0]}), and none is run; remove the entry")


def _check_index(file: Path, content: dict[str, Any], origin: Origin) -> None:
    names = content.get("weight_map")
    if not isinstance(names, dict) or not names:
        raise origin.refusal(f"{_place(file)} has no weight_map")
    for tensor, name in names.items():
        if not isinstance(name, str) or Path(name).name != name or "\\" in name:
            raise origin.refusal(f"{_place(file)} names {name!r} for {tensor}, which is no file of its own folder")
        if not name.endswith(SUFFIX):
            raise origin.refusal(f"{_place(file)} names {name!r} for {tensor}; only {SUFFIX} files are read")


def headers(folder: Path, origin: Origin) -> Iterator[tuple[Path, Shapes]]:
    """Each safetensors file of a folder and the shapes in it, by its header alone.

    Raises:
        BadInput: a file that is none, or holds anything but floating-point numbers where these belong.
    """
    for file in sorted(folder.glob(f"*{SUFFIX}")):
        yield file, _shapes(file, origin)


def read_tensors(path: Path, origin: Origin) -> dict[str, Tensor]:
    """All tensors of a safetensors file, or of those of a folder, in main memory.

    Raises:
        BadInput: one that does not load, or holds NaN or infinity.
    """
    found: dict[str, Tensor] = {}
    for file in sorted(path.glob(f"*{SUFFIX}")) if path.is_dir() else [path]:
        check_safetensors(file, origin)
        found |= load_file(file)
    for name, tensor in found.items():
        if not torch.isfinite(tensor).all():
            raise origin.refusal(f"its {name} holds NaN or infinity")
    return found


def check_safetensors(file: Path, origin: Origin) -> None:
    """Whether a file holds floating-point tensors, by its header."""
    _shapes(file, origin)


def _shapes(file: Path, origin: Origin) -> Shapes:
    try:
        with safe_open(file, "pt") as opened:
            parts = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            kinds = {name: part.get_dtype() for name, part in parts.items()}
            shapes = {name: tuple(part.get_shape()) for name, part in parts.items()}
    except (SafetensorError, OSError) as error:
        reason = " ".join(str(error).split())[:120]
        raise origin.refusal(f"{_place(file)} is not readable as safetensors ({reason})") from error
    for name, kind in kinds.items():
        if not kind.startswith(("F", "BF")) and not name.endswith(INTEGERS):
            raise origin.refusal(f"{_place(file)}: {name} is of type {kind}; only floating-point is taken")
    return shapes


def _place(file: Path) -> str:
    """A file as messages call it, with its folder."""
    return f"{file.parent.name}/{file.name}"


def file_of(tensor: str, folder: Path, origin: Origin) -> str:
    """The file that holds a tensor, by its name or the end of its name; the folder where none tells."""
    for file, shapes in headers(folder, origin):
        if tensor in shapes or any(name.endswith(f".{tensor}") or tensor.endswith(f".{name}") for name in shapes):
            return _place(file)
    return folder.name
