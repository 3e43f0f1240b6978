"""Prompts with whatever metadata their scorer needs, and which of them an iteration uses."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tempflow.common.errors import BadInput
from tempflow.common.files import resolve


@dataclass(frozen=True)
class Prompt:
    """One prompt. Example: Prompt("a red cube", {"include": [{"class": "cube", "count": 1, "color": "red"}]})."""

    text: str
    metadata: Mapping[str, Any] = field(default_factory=dict)


def read_prompts(path: str, setting: str) -> list[Prompt]:
    """Prompts of a text file (one a line) or a .jsonl file (objects with `prompt`; the rest is metadata).

    Of a folder, as the data sets of Flow-GRPO are, `train_metadata.jsonl` or `train.txt`; for prompts.test, test's.

    Args:
        setting: the name of the field that gave the path, for error messages.
    Raises:
        BadInput: no such file, no prompt in it, or a line that is no prompt object.
    """
    file = _file(resolve(path, setting), setting)
    if not file.is_file():
        hint = "no such file; give a .txt or .jsonl file of prompts, or a folder of train and test files"
        raise BadInput(setting, path, hint)
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (UnicodeDecodeError, OSError) as error:
        raise BadInput(setting, path, f"not readable as UTF-8 text ({error})") from error
    numbered = [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise BadInput(setting, path, "the file holds no prompt; put one a line")
    if file.suffix == ".json":
        raise BadInput(setting, path, "give JSON objects one a line, in a .jsonl file")
    if file.suffix != ".jsonl":
        return [Prompt(line) for _, line in numbered]
    return [_parse(line, f"{path}:{number}", setting) for number, line in numbered]


def _file(path: Path, setting: str) -> Path:
    """The file of a folder that holds the prompts asked for; any other path as it is."""
    if not path.is_dir():
        return path
    split = "test" if setting == "prompts.test" else "train"
    names = [f"{split}_metadata.jsonl", f"{split}.jsonl", f"{split}.txt"]
    found = next((path / name for name in names if (path / name).is_file()), None)
    if found is None:
        raise BadInput(setting, path, f"the folder holds none of {', '.join(names)}")
    return found


def _parse(line: str, place: str, setting: str) -> Prompt:
    try:
        values = json.loads(line)
        text = values.pop("prompt")
        if not isinstance(text, str):
            raise TypeError(text)
        return Prompt(text, values)
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise BadInput(setting, place, 'each line must be a JSON object such as {"prompt": "..."}') from error


