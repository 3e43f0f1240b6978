"""The process of one part: `python benchmarks/half_hour/measure.py PART --device cuda --folder F --seconds 60`.

Exit status: 0 done, 77 there is nothing to do here, 75 not all was done, in time or in this process;
anything else is a failure.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STARTED = time.monotonic()
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from importable import ROOT  # noqa: E402, isort: skip

sys.path.insert(0, str(ROOT / "tests" / "support"))
MEASURES = {
    "numerics": "kernel_checks:numerics",
    "determinism": "kernel_checks:determinism",
    "graph": "kernel_checks:graph",
    "sanitizer": "kernel_checks:sanitizer",
    "sanitized": "kernel_checks:sanitized",
    "tests": "gpu_tests:run_tests",
    "operators": "operator_times:measure_operators",
    "rollouts": "training:rollouts",
    "memory": "training:memory",
    "ratio": "training:first_ratio",
    "attention": "attention_times:measure_attention",
}
"""part -> module of this folder and function"""
SPARE = 10.0
"""seconds before its limit at which a part should end by itself"""


class Skip(Exception):
    """There is nothing to do here; the message says why."""


class Unfinished(Exception):
    """Time ran out before all was done; a later call goes on."""


class Broken(Exception):
    """The device does not work in this process any more; a process of its own goes on with what is left."""


EXITS = {"Skip": 77, "Unfinished": 75, "Broken": 75}


@dataclass(frozen=True)
class Options:
    """What a part is asked."""

    device: str
    tiny: bool
    folder: Path
    part: str
    deadline: float
    """on the monotonic clock"""

    @property
    def file(self) -> Path:
        return self.folder / f"{self.part}.jsonl"

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def write(self, **row: Any) -> None:
        """A row, at once, with device, versions, commit and date."""
        from machine.environment import environment

        with self.file.open("a", encoding="utf-8") as out:
            out.write(json.dumps(row | environment(self.device)) + "\n")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=list(MEASURES))
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--tiny", action="store_true")
    asked = parser.parse_args(arguments)
    module, function = MEASURES[asked.part].split(":")
    options = Options(asked.device, asked.tiny, asked.folder, asked.part, STARTED + asked.seconds - SPARE)
    try:
        getattr(importlib.import_module(f"half_hour.{module}"), function)(options)
    except Exception as error:
        name = type(error).__name__  # by name: this file is also `__main__`
        if name not in EXITS:
            raise
        print(f"{name.lower()}: {error}", flush=True)
        if name == "Broken":
            os._exit(EXITS[name])  # what would be tidied up at the end needs the device
        return EXITS[name]
    return 0


if __name__ == "__main__":
    sys.exit(main())
