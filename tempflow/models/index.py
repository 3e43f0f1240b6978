"""A pipeline's model_index.json: where it lies, which parts it names, and whether these may be made."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import diffusers
import transformers
from diffusers import DiffusionPipeline
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from tempflow.common.errors import BadInput
from tempflow.common.files import resolve
from tempflow.models.weights.files import check_code, read_json
from tempflow.models.weights.origin import Origin

LIBRARIES = {"diffusers": diffusers, "transformers": transformers}
NETWORKS = ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")


def origin_of(path: str) -> Origin:
    """Where a pipeline's files come from."""
    return Origin("model.path", path)


def read_index(path: str) -> tuple[Path, dict[str, Any]]:
    """The pipeline's model_index.json, from a folder or the hub: the folder it lies in, and its content.

    Raises:
        BadInput: there is none, or it names no pipeline class.
    """
    folder = resolve(path, "model.path")
    file = folder / "model_index.json" if folder.exists() else _hub_index(path)
    if not file.is_file():
        raise BadInput("model.path", path, "the folder has no model_index.json; give a diffusers pipeline folder")
    index = read_json(file, origin_of(path))
    if not isinstance(index.get("_class_name"), str):
        raise BadInput("model.path", path, "its model_index.json names no pipeline class")
    check_code(file, index, origin_of(path))
    return file.parent, index


def _hub_index(path: str) -> Path:
    """model_index.json of a hub repository, from the cache or the network."""
    if path.count("/") != 1 or path.startswith((".", "/", "~", "tempflow:")):
        raise BadInput("model.path", path, "no such folder")
    try:
        return Path(hf_hub_download(path, "model_index.json"))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        hint = "no such folder, and the hub did not give it (absent, gated, or no network); check path and login"
        raise BadInput("model.path", path, hint) from error


def check_index(
    pipeline_class: type[DiffusionPipeline], index: dict, optional: tuple[str, ...], origin: Origin
) -> None:
    """Looks at the parts that a model_index.json names.

    Args:
        optional: parts that the pipeline can do without.
    Raises:
        BadInput: a part that is missing, of a library or class that is not known, or no part of this pipeline.
    """
    wanted = inspect.signature(pipeline_class.__init__).parameters
    for name, parameter in wanted.items():
        needed = parameter.default is inspect.Parameter.empty and name not in ("self", *optional)
        if needed and not is_given(index.get(name)):
            raise origin.refusal(f"its model_index.json names no {name}, which a {pipeline_class.__name__} needs")
    for name, value in index.items():
        if isinstance(value, list) and any(entry is not None for entry in value):
            _check_entry(name, value, origin)
    for encoder in (name for name, value in index.items() if name.startswith("text_encoder") and is_given(value)):
        tokenizer = encoder.replace("text_encoder", "tokenizer")
        if not is_given(index.get(tokenizer)):
            raise origin.refusal(f"its model_index.json names {encoder}, but no {tokenizer}")
    _check_kinds(pipeline_class, index, origin)


def is_given(value: Any) -> bool:
    """Whether an entry names a part."""
    return isinstance(value, list) and bool(value) and value[0] is not None


def class_of(value: list[str]) -> Any:
    """The class that an entry [library, class] names."""
    return getattr(LIBRARIES[value[0]], value[1])


def _check_entry(name: str, value: list, origin: Origin) -> None:
    """Only classes of diffusers and transformers are made, and no file of the folder is run."""
    known = (
        name.isidentifier()
        and len(value) == 2
        and all(isinstance(entry, str) for entry in value)
        and value[0] in LIBRARIES
    )
    if not known or not isinstance(getattr(LIBRARIES[value[0]], value[1], None), type):
        hint = f"its model_index.json wants {value} as {name}; only classes of {' and '.join(LIBRARIES)} are made"
        raise origin.refusal(hint)


def _check_kinds(pipeline_class: type[DiffusionPipeline], index: dict, origin: Origin) -> None:
    """Networks of the classes that the pipeline is written for."""
    for name, kinds in pipeline_class._get_signature_types().items():
        if name in NETWORKS and is_given(index.get(name)):
            kind = class_of(index[name])
            if not issubclass(kind, tuple(kinds)):
                wanted = " or ".join(sorted(each.__name__ for each in kinds))
                raise origin.refusal(f"its {name} is a {kind.__name__}, but the pipeline takes a {wanted}")
