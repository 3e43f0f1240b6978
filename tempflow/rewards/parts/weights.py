"""Finding and loading what scorers are made of: folders, files, hub ids; errors in one line that names the option.

Only the scorers import this file, so `tempflow.rewards.scorer` itself stays light.
"""

from __future__ import annotations

import importlib
import pickle
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from tempflow.common.errors import BadInput
from tempflow.common.precision import DTYPES, default_precision

Loaded = TypeVar("Loaded")


def option(scorer: str, name: str) -> str:
    """How messages call an option of a scorer."""
    return f"reward.options.{scorer}.{name}"


def require(scorer: str, package: str) -> ModuleType:
    """Imports a package of the `rewards` extra.

    Raises:
        BadInput: it is not installed.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        hint = f"needs the package {package} ({error}); pip install 'tempflow[rewards]'"
        raise BadInput("reward", scorer, hint) from error


def dtype_of(scorer: str, value: str | None, device: Any) -> torch.dtype:
    """The torch dtype called fp32, bf16 or fp16; None takes what is usual on the device.

    Only networks whose score moves smoothly with their output ask for it so. TF32, the other way to fast products on a
    GPU, is a switch for the whole process: it would also round the fp32 products of the sampler that works beside.
    """
    value = value or default_precision(device)
    if value not in DTYPES:
        raise BadInput(option(scorer, "dtype"), value, f"choose one of {', '.join(DTYPES)}")
    return DTYPES[value]


def one_of(scorer: str, name: str, value: str, choices: Mapping[str, Loaded]) -> Loaded:
    """The choice that an option names."""
    if value not in choices:
        raise BadInput(option(scorer, name), value, f"choose one of {', '.join(choices)}")
    return choices[value]


def find(scorer: str, name: str, value: str | Path, load: Callable[[str], Loaded]) -> Loaded:
    """`load` of a local folder or of a hub id, with hub trouble told in one line.

    Raises:
        BadInput: no such folder, or not on the hub, or the hub cannot be reached.
    """
    path = Path(value).expanduser()
    if not path.exists() and (path.is_absolute() or str(value).startswith((".", "~"))):
        raise BadInput(option(scorer, name), value, "no such file or folder")
    try:
        return load(str(path) if path.exists() else str(value))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        hint = f"cannot be loaded; give a local folder with the files, or a hub id that can be reached ({reason})"
        raise BadInput(option(scorer, name), value, hint) from error


def tokenizer_of(kind: Any, scorer: str, name: str, value: str | Path, words: int, spare: int = 0) -> Any:
    """The tokenizer of a model with `words` token embeddings, of which `spare` at most may be without a token.

    Where its files are missing, transformers makes one that knows next to no word, without a word about it.
    """
    tokenizer = find(scorer, name, value, kind.from_pretrained)
    if not words - spare <= len(tokenizer) <= words:
        hint = (f"cannot be loaded, or is of another model: {len(tokenizer)} tokens found, {words} expected; "
                "give a local folder with the files, or a hub id that can be reached")  # fmt: skip
        raise BadInput(option(scorer, name), value, hint)
    return tokenizer


def find_file(scorer: str, name: str, value: str | Path) -> Path:
    """A local file, or one of the hub given as `owner/repository/file`, downloaded unless cached."""
    path = Path(value).expanduser()
    if path.is_file():
        return path
    owner, _, rest = str(value).partition("/")
    repository, _, file = rest.partition("/")
    if path.is_absolute() or owner in ("", ".", "..", "~") or not file:
        raise BadInput(option(scorer, name), value, "no such file; give one, or owner/repository/file of the hub")
    from huggingface_hub import hf_hub_download

    return Path(find(scorer, name, value, lambda _: hf_hub_download(f"{owner}/{repository}", file)))


def read_tensors(scorer: str, name: str, value: str | Path) -> dict[str, Tensor]:
    """Named tensors of a .safetensors file or a torch checkpoint (its `state_dict` or `model`, where it has one).

    Raises:
        BadInput: no such file, or it holds anything else than tensors and plain values.
    """
    path = find_file(scorer, name, value)
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise BadInput(option(scorer, name), value, f"not readable as safetensors ({error})") from error
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:
        reason = " ".join(str(error).split())[:120]
        raise BadInput(option(scorer, name), value, f"not readable as a checkpoint of tensors ({reason})") from error
    for key in ("state_dict", "model"):
        found = found.get(key, found) if isinstance(found, dict) else found
    entries = found.items() if isinstance(found, dict) else ()
    tensors = {key: tensor for key, tensor in entries if isinstance(tensor, Tensor)}
    if not tensors:
        raise BadInput(option(scorer, name), value, "holds no named tensors")
    return tensors


def needed(scorer: str, name: str, value: str | Path, tensors: Mapping[str, Tensor], key: str) -> Tensor:
    """A tensor that a checkpoint of this kind always has."""
    if key not in tensors:
        raise BadInput(option(scorer, name), value, f"no checkpoint of this scorer: it has no {key}")
    return tensors[key]


def renamed(tensors: Mapping[str, Tensor], rules: Sequence[tuple[str, str]]) -> dict[str, Tensor]:
    """Tensors under new names: each rule (pattern, replacement) is applied in turn to each name."""
    result = {}
    for key, tensor in tensors.items():
        for pattern, replacement in rules:
            key = re.sub(pattern, replacement, key)
        result[key] = tensor
    return result


def depth(tensors: Mapping[str, Tensor], prefix: str) -> int:
    """How many numbered layers `prefix.0`, `prefix.1`, ... a checkpoint has."""
    numbers = {key.removeprefix(f"{prefix}.").split(".")[0] for key in tensors if key.startswith(f"{prefix}.")}
    return len(numbers)


def install(module: nn.Module, tensors: Mapping[str, Tensor], field: str, value: str | Path) -> None:
    """Loads tensors into a module; every parameter must be there and fit, and nothing else may be.

    Raises:
        BadInput: a name that is missing, unknown or of another shape.
    """
    own = module.state_dict()
    for key in own.keys() | tensors.keys():
        if key not in tensors or key not in own:
            word = "misses" if key in own else "has unknown"
            raise BadInput(field, value, f"no checkpoint of this scorer: it {word} {key}")
        if own[key].shape != tensors[key].shape:
            shapes = f"{tuple(tensors[key].shape)}, expected {tuple(own[key].shape)}"
            raise BadInput(field, value, f"no checkpoint of this scorer: {key} is {shapes}")
    module.load_state_dict(tensors)


def pretrained(kind: Any, scorer: str, name: str, value: str | Path, dtype: torch.dtype, device: Any) -> nn.Module:
    """A frozen transformers model from a folder or hub id, complete: no weight is left at random.

    Args:
        kind: the transformers class.
    """

    def load(path: str) -> tuple[nn.Module, dict[str, Any]]:
        return kind.from_pretrained(path, dtype=dtype, output_loading_info=True, trust_remote_code=False)

    model, info = find(scorer, name, value, load)
    if info["missing_keys"]:
        hint = f"no weights of a {kind.__name__}: {sorted(info['missing_keys'])[0]} is missing"
        raise BadInput(option(scorer, name), value, hint)
    return frozen(model, dtype, device)


def frozen(model: nn.Module, dtype: torch.dtype, device: Any) -> nn.Module:
    """The model in evaluation mode, without gradients, in its place and precision."""
    return model.to(device=device, dtype=dtype).eval().requires_grad_(False)
