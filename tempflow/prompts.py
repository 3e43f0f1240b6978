"""Prompts with whatever metadata their scorer needs, and which of them an iteration uses."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from tempflow.common.errors import BadInput
from tempflow.common.files import read_text, user_path

OBJECTS = (".jsonl", ".ndjson")
"""Ends of files that hold one JSON object a line; the content of any other file says whether it does, too."""
TABLES = (".json", ".csv", ".tsv", ".yaml", ".yml", ".parquet", ".arrow", ".xls", ".xlsx", ".zip", ".gz", ".pkl", ".pt")
"""Ends of files that hold prompts in another form."""
HEADERS = {"prompt", "prompts", "caption", "captions", "text"}
"""What a table calls its column of prompts; a prompt of this one word is a header, too."""
OF_TEST = ("prompts.test", "--prompts")
"""Settings that take the test file of a folder."""
LARGEST = 2**30
"""Bytes of a file of prompts."""
LONGEST = 100_000
"""Characters of a prompt."""
KINDS = ("kind", "tag")
"""Where metadata say of what kind a prompt is, in a word: those of digits, and those of GenEval."""


@dataclass(frozen=True)
class Prompt:
    """One prompt. Example: Prompt("a red cube", {"include": [{"class": "cube", "count": 1, "color": "red"}]})."""

    text: str
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """What kind of prompt it is, if its metadata say."""
        named = (self.metadata.get(name) for name in KINDS)
        return next((value for value in named if isinstance(value, str) and value), "")


def read_prompts(path: str, setting: str) -> list[Prompt]:
    """Prompts of a text file (one a line) or of a file with a JSON object a line (`prompt`; the rest is metadata).

    The latter ends in .jsonl or .ndjson, or its first line is such an object. Of a folder, as the data sets of
    Flow-GRPO are, `train_metadata.jsonl` or `train.txt`; for what is evaluated, test's. Lines end with a line feed;
    empty ones are passed over.

    Args:
        setting: the name of the field that gave the path, for error messages.
    Raises:
        BadInput: no such file, no prompt in it, another form, or a line that is no prompt, by its number.
    """
    file = _file(user_path(setting, path), setting)
    if file.suffix.lower() in TABLES:
        raise BadInput(setting, path, "give text with one prompt a line (.txt), or one JSON object a line (.jsonl)")
    if not file.exists():
        hint = "no such file; give a .txt or .jsonl file of prompts, or a folder of train and test files"
        raise BadInput(setting, path, hint)
    lines = read_text(setting, file, LARGEST).replace("\r\n", "\n").split("\n")
    numbered = [(f"{path}:{number}", line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise BadInput(setting, path, "the file holds no prompt; put one a line")
    if file.suffix.lower() in OBJECTS or _is_object(numbered[0][1]):
        return [_parse(line, place, setting) for place, line in numbered]
    _refuse_header(numbered[0][1], path, setting)
    return [Prompt(_plain(line, place, setting)) for place, line in numbered]


def read_prompt(text: str, setting: str) -> Prompt:
    """A prompt by itself, as a command line gives it.

    Raises:
        BadInput: it is empty, too long, or no text.
    """
    return Prompt(_checked(text, text, setting))


def _file(path: Path, setting: str) -> Path:
    """The file of a folder that holds the prompts asked for; any other path as it is."""
    if not path.is_dir():
        return path
    split = "test" if setting in OF_TEST else "train"
    names = [f"{split}_metadata.jsonl", f"{split}.jsonl", f"{split}.txt"]
    found = next((path / name for name in names if user_path(setting, path / name).is_file()), None)
    if found is None:
        raise BadInput(setting, path, f"the folder holds none of {', '.join(names)}")
    return found


def _refuse_header(line: str, path: str, setting: str) -> None:
    """A table's first line names its columns, each a word; and JSON over several lines opens a bracket."""
    cells = [] if " " in line else re.split(r"[,;\t]", line.replace('"', "").lower())
    if HEADERS & set(cells) or line in ("{", "["):
        hint = "begins as a table or as JSON over several lines does; give prompts alone, or one JSON object a line"
        raise BadInput(setting, f"{path}:1", hint)


def _plain(line: str, place: str, setting: str) -> str:
    """A line of text that is a prompt."""
    if _is_object(line):
        raise BadInput(setting, place, "a JSON object among lines of text; give either, in a file of its own")
    return _checked(line, place, setting)


def _checked(text: str, place: str, setting: str) -> str:
    """A prompt's text that an encoder and a report can take."""
    if not text.strip():
        raise BadInput(setting, place, "the prompt is empty")
    if len(text) > LONGEST:
        raise BadInput(setting, place, f"a prompt of {len(text):,} characters; at most {LONGEST:,}")
    if any((sign < " " and sign not in "\t\n\r") or "\ud800" <= sign <= "\udfff" for sign in text):
        raise BadInput(setting, place, "the prompt holds a control character or half a character; is this text?")
    return text


def _is_object(line: str) -> bool:
    """Whether a line is a JSON object, or was meant to be one."""
    return re.match(r'\{\s*["}]', line) is not None


def _parse(line: str, place: str, setting: str) -> Prompt:
    """A line with an object in it."""
    try:
        values = json.loads(line, object_pairs_hook=_once, parse_constant=_refuse_constant)
        text = values.pop("prompt")
        if not isinstance(text, str):
            raise TypeError(text)
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        said = f" ({error})" if type(error) is ValueError else ""
        raise BadInput(setting, place, f'each line must be a JSON object such as {{"prompt": "..."}}{said}') from error
    return Prompt(_checked(text, place, setting), values)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose keys each come once."""
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("a key is given twice")
    return values


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")
