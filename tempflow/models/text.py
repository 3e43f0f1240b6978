"""Encoded texts: each text is encoded once, on its own, and kept in memory and, if asked, on disk."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tempflow.common.errors import BadInput
from tempflow.common.say import say
from tempflow.models.weights.parts import nonfinite

MEMORY_LIMIT = 8 * 2**30
"""Bytes of encoded texts kept in main memory; the texts used longest ago go first."""

Row = dict[str, Tensor]


class TextRows:
    """Rows of encoded texts. A row does not depend on the texts that were asked for along with it."""

    def __init__(
        self,
        encode: Callable[[str], Row],
        encoders: Sequence[nn.Module],
        device: torch.device,
        dtype: torch.dtype,
        offload: bool,
        folder: Path | None = None,
        identity: str = "",
    ):
        """`encode` gives the row (1, ...) of one text with the `encoders` on `device`.

        Args:
            dtype: floating-point rows are kept in this precision, the network's.
            offload: the encoders stay on the CPU except while they work.
            folder: where rows are kept from run to run, under a hash of `identity` and text.
        """
        self.encode, self.encoders = encode, encoders
        self.device, self.dtype, self.offload = device, dtype, offload
        self.folder, self.identity = folder, identity
        self.memory: OrderedDict[str, Row] = OrderedDict()
        self.bytes = 0
        self.layout: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        """shape and type of each tensor of a row"""
        self._place("cpu" if offload else device)
        if folder is not None:
            _make_folder(folder)

    def rows(self, texts: Sequence[str]) -> Row:
        """Name -> (len(texts), ...) on the device."""
        missing = [text for text in dict.fromkeys(texts) if text not in self.memory]
        fresh = {text: row for text in missing if (row := self._read(text)) is not None}
        fresh |= self._encode([text for text in missing if text not in fresh])
        rows = [self.memory.get(text) or fresh[text] for text in texts]
        self._check_layout(rows)
        for text in texts:
            self._remember(text, self.memory.get(text) or fresh[text])
        return {name: torch.cat([row[name] for row in rows]).to(self.device) for name in rows[0]}

    @torch.no_grad()
    def _encode(self, texts: Sequence[str]) -> dict[str, Row]:
        if not texts:
            return {}
        self._place(self.device)
        found = {}
        for text in texts:
            row = self.encode(text)
            found[text] = {name: self._kept(tensor) for name, tensor in row.items()}
            for name in nonfinite(found[text]):
                precision = str(self.dtype).removeprefix("torch.")
                hint = f"its text encoders compute NaN or infinity in {precision} ({name} of {text[:40]!r})"
                raise BadInput("model.path", "text_encoder", f"{hint}; try model.text_dtype=bf16")
            self._write(text, found[text])
        if self.offload:
            self._place("cpu")
        return found

    def _kept(self, tensor: Tensor) -> Tensor:
        return tensor.to("cpu", self.dtype if tensor.is_floating_point() else tensor.dtype).contiguous()

    def _place(self, device: torch.device | str) -> None:
        for encoder in self.encoders:
            encoder.to(device)

    def _remember(self, text: str, row: Row) -> None:
        if text not in self.memory:
            self.memory[text] = row
            self.bytes += _size(row)
        self.memory.move_to_end(text)
        while self.bytes > MEMORY_LIMIT and len(self.memory) > 1:
            self.bytes -= _size(self.memory.popitem(last=False)[1])

    def _file(self, text: str) -> Path:
        assert self.folder is not None
        name = hashlib.sha256(json.dumps([self.identity, text]).encode()).hexdigest()
        return self.folder / f"{name}.safetensors"

    def _read(self, text: str) -> Row | None:
        if self.folder is None or not self._file(text).is_file():
            return None
        try:
            row = load_file(self._file(text))
        except (SafetensorError, OSError) as error:
            say(f"{self._file(text)} does not load ({error}); encoding its text again", everywhere=True)
            return None
        for name in nonfinite(row):
            problem = f"its {name} holds NaN or infinity"
            say(f"{self._file(text)} is not used ({problem}); encoding its text again", everywhere=True)
            return None
        return row

    def _check_layout(self, rows: Sequence[Row]) -> None:
        """All rows of a run are of the same tensors; one of another kind can only have been written by others."""
        for row in rows:
            layout = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in row.items()}
            self.layout = self.layout or layout
            if layout != self.layout:
                hint = "its files hold rows of different names, shapes or types; give another folder, or empty it"
                raise BadInput("model.text_cache", self.folder, hint)

    def _write(self, text: str, row: Row) -> None:
        """Complete or not at all; several processes may write the same row. Where it cannot be, memory has to do."""
        if self.folder is None:
            return
        partial = None
        try:
            descriptor, partial = tempfile.mkstemp(dir=self.folder, suffix=".partial")
            os.close(descriptor)
            save_file(row, partial)
            os.replace(partial, self._file(text))
        except (OSError, SafetensorError) as error:
            say(f"warning: model.text_cache={self.folder}: cannot be written any more ({error})", everywhere=True)
            self.folder = None
            if partial is not None:
                Path(partial).unlink(missing_ok=True)


def _size(row: Row) -> int:
    return sum(tensor.nbytes for tensor in row.values())


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise BadInput("model.text_cache", folder, f"cannot be written ({error.strerror})") from error


def files_identity(folder: Path, prefixes: Sequence[str]) -> str:
    """Names, sizes and times of the files in the sub-folders of `folder` that start with one of `prefixes`."""
    parts = sorted(path for prefix in prefixes for path in folder.glob(f"{prefix}*/*"))
    return json.dumps([[str(path.relative_to(folder)), path.stat().st_size, path.stat().st_mtime_ns] for path in parts])
