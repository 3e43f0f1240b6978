"""Every format: how it is written, and the bytes it needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tqdm import tqdm

from tempflow.common.errors import BadInput
from tempflow.export.base import check_public
from tempflow.export.card import write_card
from tempflow.export.subject import Subject
from tempflow.export.upload import HubOptions
from tempflow.models.formats.layouts import rounded
from tempflow.models.formats.loras import lora_format, lora_tensors, write_lora
from tempflow.models.formats.whole import copy_files, other_files, transformer_bytes, write_transformer
from tempflow.models.index import read_index
from tempflow.models.network.adapters import save_adapters, saved_names

SMALL = 2**24
"""Bytes that a model card and its pictures may have."""


@dataclass(frozen=True)
class Writer:
    """A format."""

    write: Callable[[Subject, Path, HubOptions], None]
    """makes the file or folder, which is not there yet"""
    needed: Callable[[Subject, HubOptions], int]
    """bytes, about; what cannot be written is refused here already"""


def _write_weights(subject: Subject, folder: Path, options: HubOptions) -> None:
    """What diffusers loads: a LoRA file, or a transformer."""
    if not subject.lora:
        write_transformer(subject.source, subject.trained, folder / "transformer", subject.whole_dtype)
        return
    folder.mkdir()
    network, dtype = subject.network, subject.adapter_dtype
    for name, change in subject.trained.changes.items():
        rounded(name, change.up, dtype)  # which refuses what fp16 cannot hold
    save_adapters(network.module, network.pipeline_class, folder, saved_names(subject.run.parameters), dtype)


def _weights_needed(subject: Subject, options: HubOptions) -> int:
    if not subject.lora:
        return transformer_bytes(subject.source, subject.whole_dtype)
    return sum(tensor.numel() for tensor in subject.run.parameters.values()) * subject.adapter_dtype.itemsize


def _write_lora(to: str, subject: Subject, file: Path, options: HubOptions) -> None:
    """A LoRA file of another program."""
    rule = lora_format(to, subject.network.pipeline_class)
    tensors = lora_tensors(subject.trained.changes, subject.network.module, rule, subject.adapter_dtype)
    run = subject.run
    write_lora(file, tensors, {"software": "tempflow", "iteration": str(run.iteration), "weights": run.weights})


def _lora_needed(to: str, subject: Subject, options: HubOptions) -> int:
    if not subject.lora:
        hint = "the run trained all parameters, which is no LoRA; take diffusers, merged or hub"
        raise BadInput("--to", to, hint)
    lora_format(to, subject.network.pipeline_class)
    return 4 * _weights_needed(subject, options)  # stacked layers: ranks of four parts beside each other, mostly zeros


def _write_merged(subject: Subject, folder: Path, options: HubOptions) -> None:
    """The base's other parts as they are, and the transformer with the change in it."""
    folder.mkdir()
    files = other_files(subject.base, read_index(subject.model.path)[1])
    copy_files(subject.base, files, folder, partial(tqdm, desc="other parts", unit="file", leave=False))
    write_transformer(subject.source, subject.trained, folder / "transformer", subject.whole_dtype)


def _merged_needed(subject: Subject, options: HubOptions) -> int:
    files = other_files(subject.base, read_index(subject.model.path)[1])
    copied = sum((subject.base / file).stat().st_size for file in files)
    return copied + transformer_bytes(subject.source, subject.whole_dtype)


def _hub_needed(subject: Subject, options: HubOptions) -> int:
    if options.repository:
        check_public(subject, options.base_model)
    return _weights_needed(subject, options) + SMALL


def _write_hub(subject: Subject, folder: Path, options: HubOptions) -> None:
    _write_weights(subject, folder, options)
    write_card(subject, folder, options)


WRITERS = {
    "diffusers": Writer(_write_weights, _weights_needed),
    "comfyui": Writer(partial(_write_lora, "comfyui"), partial(_lora_needed, "comfyui")),
    "kohya": Writer(partial(_write_lora, "kohya"), partial(_lora_needed, "kohya")),
    "merged": Writer(_write_merged, _merged_needed),
    "hub": Writer(_write_hub, _hub_needed),
}
"""Those of `tempflow.export.names.FORMATS`."""
