"""One part of a pipeline loaded from its folder: files, names, shapes, types and numbers as its configuration says.

Shapes are read from the files' headers, before any number. What is missing or too much the libraries themselves report
once they have loaded, for only they know the older names that they still take. That all numbers are finite is seen in
one pass over the weights where they lie in the end, on the GPU if there is one: at its memory's bandwidth, and the host
waits once for each part. It sees the numbers as they are used, so also those that fp16 cannot hold.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tempflow.models.weights.files import check_files, file_of, headers
from tempflow.models.weights.origin import Origin

NOT_NEEDED = re.compile(r"(position_ids|inv_freq)$")
"""Extra tensors of older files: constants that are computed today."""
NOT_NEEDED_OF_TEXT = re.compile(
    r"^(lm_head|logit_scale|text_projection|visual|vision_model|visual_projection|decoder)(\.|$)"
)
"""Extra tensors of a text encoder: those of the larger model that it was cut out of."""


def load_part(kind: Any, folder: Path, dtype: torch.dtype, origin: Origin) -> nn.Module:
    """A diffusers or transformers network of class `kind`, on the CPU, frozen.

    Raises:
        BadInput: it does not load, or files and configuration do not agree; file and tensor are named.
    """
    check_files(folder, origin)
    with origin.one_line():
        check_shapes(without_weights(kind, folder), folder, origin)
        part, report = kind.from_pretrained(
            folder, torch_dtype=dtype, use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True
        )
    _check_report(report, folder, origin)
    return part.requires_grad_(False).eval()


def without_weights(kind: Any, folder: str | Path, **where: str) -> nn.Module:
    """The network that a configuration describes, on device `meta`."""
    with torch.device("meta"), torch.random.fork_rng(devices=()):  # numbers are drawn all the same
        if hasattr(kind, "load_config"):
            return kind.from_config(kind.load_config(folder, **where)).requires_grad_(False)
        return kind(kind.config_class.from_pretrained(folder, **where)).requires_grad_(False)


def check_shapes(network: nn.Module, folder: Path, origin: Origin) -> None:
    """Compares the files' tensors of the network's own names with it, by their headers.

    Raises:
        BadInput: one has another shape, or holds no floating-point numbers.
    """
    own = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    for file, shapes in headers(folder, origin):
        for name, shape in shapes.items():
            if own.get(name, shape) != shape:
                hint = f"{folder.name}/{file.name}: {name} has shape {shape}, not {own[name]} as the configuration says"
                raise origin.refusal(hint)


def _check_report(report: Mapping[str, Any], folder: Path, origin: Origin) -> None:
    """Looks at what a library says that it could not use or find."""
    for name, *shapes in sorted(report["mismatched_keys"]):
        found, wanted = (tuple(shape) for shape in shapes)
        where = file_of(name, folder, origin)
        raise origin.refusal(f"{where}: {name} has shape {found}, not {wanted} as the configuration says")
    if report["missing_keys"]:
        name, more = min(report["missing_keys"]), len(report["missing_keys"]) - 1
        raise origin.refusal(f"{_files(folder)} lacks the tensor {name}{_others(more)} of its configuration")
    extra = [name for name in report["unexpected_keys"] if not _not_needed(name, folder)]
    if extra:
        name, where = min(extra), file_of(min(extra), folder, origin)
        raise origin.refusal(f"{where}: {name}{_others(len(extra) - 1)} is no tensor of its configuration")


def _not_needed(name: str, folder: Path) -> bool:
    of_text = folder.name.startswith("text_encoder") and NOT_NEEDED_OF_TEXT.search(name)
    return bool(NOT_NEEDED.search(name) or of_text)


def _files(folder: Path) -> str:
    files = sorted(file.name for file in folder.glob("*.safetensors"))
    return f"{folder.name}/{files[0]}" if len(files) == 1 else folder.name


def _others(count: int) -> str:
    return f" (and {count} more)" if count else ""


def nonfinite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors that hold NaN or infinity; the host waits once."""
    names = [name for name, tensor in tensors.items() if tensor.is_floating_point() and tensor.numel()]
    if not names:
        return []
    largest = torch._foreach_norm([tensors[name].detach() for name in names], float("inf"))
    finite = torch.stack([value.float() for value in largest]).isfinite().tolist()
    return [name for name, good in zip(names, finite, strict=True) if not good]


def check_finite(part: nn.Module, folder: Path, origin: Origin) -> None:
    """Whether all weights of a part are numbers, in the precision and on the device where they are used.

    Raises:
        BadInput: file and name of the first that is not.
    """
    tensors = part.state_dict()
    bad = nonfinite(tensors)
    if bad:
        precision = str(tensors[bad[0]].dtype).removeprefix("torch.")
        where = file_of(bad[0], folder, origin)
        raise origin.refusal(f"{where}: {bad[0]}{_others(len(bad) - 1)} holds NaN or infinity in {precision}")
