"""What a run came to: its weights and figures, and whether those of two runs are the same bit for bit."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from faults.deeds import newest
from safetensors.torch import load_file

from tempflow.records.rows import read_metrics

CLOCK = re.compile(r"second|per_hour|memory|peak|time|wait")
"""names of figures that differ from run to run"""


def differences(run: Path, other: Path) -> list[str]:
    """What differs: names of tensors and figures; empty where the two runs came to the same."""
    return [*_tensors(run, other), *_figures(run, other)]


def _tensors(run: Path, other: Path) -> list[str]:
    found = []
    here, there = _files(run), _files(other)
    if here.keys() != there.keys():
        found.append(f"files {sorted(here.keys() ^ there.keys())}")
    for name in here.keys() & there.keys():
        a, b = load_file(here[name]), load_file(there[name])
        same = a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
        found += [] if same else [name]
    return found


def _files(run: Path) -> dict[str, Path]:
    """The files of the newest checkpoint and of the trained weights."""
    files = {f"{newest(run).name}/{path.name}": path for path in newest(run).rglob("*.safetensors")}
    trained = (*run.glob("*.safetensors"), *run.glob("transformer/*.safetensors"))
    return files | {str(path.relative_to(run)): path for path in trained}


def _figures(run: Path, other: Path) -> list[str]:
    here, there = ([_timeless(row) for row in read_metrics(folder / "metrics.jsonl")] for folder in (run, other))
    if len(here) != len(there):
        return [f"{len(here)} lines of metrics, not {len(there)}"]
    return [f"metrics of iteration {a.get('step')}: {sorted(k for k in a.keys() | b.keys() if a.get(k) != b.get(k))}"
            for a, b in zip(here, there, strict=True) if a != b]  # fmt: skip


def _timeless(row: dict[str, Any]) -> dict[str, str]:
    """As text, in which NaN equals NaN."""
    return {name: repr(value) for name, value in row.items() if not CLOCK.search(name)}


def words(folder: Path) -> list[str]:
    """The lines that ranks said, without the progress bar."""
    return [line for text in _said(folder) for line in re.findall(r"tempflow: [^\r\n]*", text)]


def traceback_in(folder: Path) -> bool:
    """Whether a rank's output shows one; torchrun's own report of a failed rank is torchrun's."""
    return any("Traceback (most recent call last)" in text for text in _said(folder))


def _said(folder: Path) -> list[str]:
    """What each rank wrote."""
    paths = (path for path in sorted(folder.rglob("*")) if path.suffix in (".txt", ".log"))
    return [path.read_text(errors="replace") for path in paths if path.name not in ("torchrun.txt", "modules.txt")]
