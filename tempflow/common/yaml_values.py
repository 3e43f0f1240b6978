"""YAML as version 1.2 has it, read to plain values: what looks like a number is one, and nothing else is.

    007, +7, 1e-4, .5, 0x1f    numbers, 007 in tens
    1_000, 12:30, 2024-13-01   words
    true, false, null, ~       as they say; yes, no, on, off are words

The library reads version 1.1, in which 010 is 8, 12:30 is 750 and yes is true. Here its parser is used, with other
rules for what a word means, and refusals for what is most likely a mistake: a key given twice, a tag, text that goes on
behind a value, and nesting or repetition without end.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import yaml

from tempflow.common.errors import BadInput
from tempflow.common.files import read_text

DEEPEST = 20
"""Lists and mappings within one another."""
MOST = 100_000
"""Values of one file, with those that are repeated by an alias."""
DIGITS = 400
"""Signs of a number."""
LARGEST = 2**18
"""Bytes of a file: the parser takes seconds for as many."""

Place = tuple[Any, ...]
"""Keys and numbers of list entries that lead to a value."""


class Unreadable(ValueError):
    """Text that is no YAML, or YAML that is not taken here; says why in one line."""


class _Loader(yaml.SafeLoader):
    """The library's parser, with the words of YAML 1.2."""

    yaml_implicit_resolvers: dict[str, list[Any]] = {}  # noqa: RUF012 - the library's own manner


class _Dumper(yaml.SafeDumper):
    """Quotes what version 1.2 would read as something else than a word, besides what version 1.1 would."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


INTEGER, HEXADECIMAL = re.compile(r"[-+]?[0-9]+"), re.compile(r"0o[0-7]+|0x[0-9a-fA-F]+")
RULES = (
    ("null", re.compile(r"~|null|Null|NULL|"), ["~", "n", "N", ""]),
    ("bool", re.compile(r"true|True|TRUE|false|False|FALSE"), list("tTfF")),
    ("int", re.compile(rf"{INTEGER.pattern}|{HEXADECIMAL.pattern}"), list("-+0123456789")),
    ("float", re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?"), list("-+.0123456789")),
    ("float", re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"), list("-+.")),
)
"""Type, how it is written, and how it begins: the core schema of YAML 1.2.2, section 10.3.2."""
TAG = "tag:yaml.org,2002:"
for _name, _pattern, _starts in RULES:
    _whole = re.compile(rf"(?:{_pattern.pattern})\Z")
    _Loader.add_implicit_resolver(f"{TAG}{_name}", _whole, _starts)
    _Dumper.add_implicit_resolver(f"{TAG}{_name}", _whole, _starts)


def check_word(text: str) -> str:
    """The text itself.

    Raises:
        Unreadable: it holds a NUL or half a character, which no file name and no text encoder takes.
    """
    if "\0" in text or any("\ud800" <= sign <= "\udfff" for sign in text):
        raise Unreadable("a NUL, or bytes that are not UTF-8")
    return text


def _integer(text: str) -> int:
    return int(text, 0) if HEXADECIMAL.fullmatch(text) else int(text)


SCALARS: dict[str, Callable[[str], Any]] = {
    "null": lambda text: None,
    "bool": lambda text: text.lower() == "true",
    "int": _integer,
    "float": lambda text: float(re.sub(r"\.(?=[in])", "", text.lower())),
    "str": check_word,
}
"""Type -> its value, from how it is written."""


def read_yaml(text: str, is_text: Callable[[Place], bool] = lambda place: False) -> Any:
    """The value that a text stands for: dict with strings as keys, list, str, int, float, bool or None.

    Args:
        is_text: whether a number or truth value at a place is to stay the word that was written.
    Raises:
        Unreadable: with the reason.
    """
    node = _compose(text)
    return None if node is None else _value(node, (), is_text, count(1))


def read_word(text: str, is_text: Callable[[Place], bool] = lambda place: False) -> Any:
    """The value of all of a text, as behind `field=`: as `read_yaml`, but nothing in it is a comment.

    Raises:
        Unreadable: with the reason.
    """
    node = _compose(text)
    outside = text if node is None else text[: node.start_mark.index] + text[node.end_mark.index :]
    if outside.strip():
        raise Unreadable(f"{outside.strip()[:20]} is no part of a value")
    return None if node is None else _value(node, (), is_text, count(1))


def _compose(text: str) -> yaml.Node | None:
    """The one document of a text."""
    try:
        return yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        place = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise Unreadable(f"{error.problem or error.context}{place}") from error
    except yaml.YAMLError as error:
        raise Unreadable(" ".join(str(error).split())) from error
    except RecursionError as error:
        raise Unreadable(f"lists or mappings within one another, more than {DEEPEST} deep") from error


def _value(node: yaml.Node, place: Place, is_text: Callable[[Place], bool], counter: count[int]) -> Any:
    """A node as plain values."""
    line, kind = node.start_mark.line + 1, node.tag.removeprefix(TAG)
    if next(counter) > MOST:
        raise Unreadable(f"more than {MOST:,} values, repetitions included")
    if len(place) > DEEPEST:
        raise Unreadable(f"lists or mappings within one another, more than {DEEPEST} deep, line {line}")
    if isinstance(node, yaml.SequenceNode) and kind == "seq":
        return [_value(item, (*place, number), is_text, counter) for number, item in enumerate(node.value)]
    if isinstance(node, yaml.MappingNode) and kind == "map":
        return {name: _value(item, (*place, name), is_text, counter) for name, item in _entries(node.value)}
    if not isinstance(node, yaml.ScalarNode) or kind not in SCALARS:
        raise Unreadable(f"the tag {node.tag} is not taken, line {line}")
    if node.style is None and kind not in ("str", "null") and is_text(place):
        return node.value
    return _scalar(kind, node.value, line)


def _scalar(kind: str, text: str, line: int) -> Any:
    if kind in ("int", "float") and len(text) > DIGITS:
        raise Unreadable(f"a number of {len(text)} digits, line {line}")
    try:
        return SCALARS[kind](text)
    except ValueError as error:
        raise Unreadable(f"{error}, line {line}" if kind == "str" else f"{text} is no {kind}, line {line}") from error


def _entries(pairs: Sequence[tuple[yaml.Node, yaml.Node]]) -> Iterator[tuple[str, yaml.Node]]:
    """The entries of a mapping; each key is a word as it is written, and is given once."""
    found: set[str] = set()
    for key, item in pairs:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode) or key.tag.removeprefix(TAG) not in SCALARS:
            raise Unreadable(f"a key must be a word, line {line}")
        name = _scalar("str", key.value, line)
        if name in found:
            raise Unreadable(f"{name} is given twice, line {line}")
        found.add(name)
        yield name, item


def read_yaml_file(field: str, path: str | Path, is_text: Callable[[Place], bool] = lambda place: False) -> Any:
    """The value of a file.

    Raises:
        BadInput: naming the field that gave its path.
    """
    try:
        return read_yaml(read_text(field, path, LARGEST), is_text)
    except Unreadable as error:
        raise BadInput(field, path, f"not readable as YAML ({error})") from error


def to_yaml(values: Any) -> str:
    """Plain values as YAML, which both versions read as they are."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False)
