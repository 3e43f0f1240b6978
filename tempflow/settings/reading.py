"""Reading a configuration: presets that state only differences, YAML files, overrides.

`load(["sd35_pickscore", "learn.lr=1e-4"])`: a preset name or YAML file, then `section.field=value` overrides. An
unknown or ill-typed field is refused with the nearest name. The fields themselves stand in `settings.py`.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from tempflow.common.errors import BadInput
from tempflow.common.files import PACKAGE
from tempflow.settings.fields import Config


def load(arguments: Sequence[str]) -> Config:
    """The configuration of a command line: an optional preset name or YAML file first, then overrides.

    Raises:
        BadInput: unknown preset, unreadable YAML, unknown or ill-typed field.
    """
    arguments = list(arguments)
    source = arguments.pop(0) if arguments and "=" not in arguments[0] else "digits"
    values = read_values(source)
    for argument in arguments:
        _override(values, argument)
    return validate(values)


def presets() -> dict[str, Path]:
    """Name -> file of every preset that ships with the package."""
    return {path.stem: path for path in sorted((PACKAGE / "settings" / "presets").glob("*.yaml"))}


def read_values(source: str, seen: tuple[Path, ...] = ()) -> dict[str, dict[str, Any]]:
    """The sections of a preset or YAML file, on top of those it `extends`; `seen` are the files that extend it."""
    path = presets().get(source, Path(source).expanduser())
    if not path.is_file():
        raise BadInput("preset", source, f"no such preset or YAML file; presets: {', '.join(presets())}")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise BadInput("preset", source, f"not readable as YAML ({' '.join(str(error).split())})") from error
    parts = [part for key, part in values.items() if key != "extends"] if isinstance(values, dict) else [values]
    if not all(isinstance(part, dict) for part in parts):
        raise BadInput("preset", source, "a preset is sections of fields, such as `learn: {lr: 1e-4}`")
    merged = _parent(values.pop("extends"), path, seen) if "extends" in values else {}
    for name, part in values.items():
        merged.setdefault(name, {}).update(part)
    return merged


def _parent(name: object, path: Path, seen: tuple[Path, ...]) -> dict[str, dict[str, Any]]:
    """The sections of the preset or file that `path` extends; a relative file is sought beside it."""
    if not isinstance(name, str):
        raise BadInput("extends", name, f"in {path}: give the name of one preset or YAML file")
    if path.resolve() in seen:
        raise BadInput("extends", name, f"in {path}: presets extend each other in a circle")
    source = name if name in presets() else str(path.parent / Path(name).expanduser())
    return read_values(source, (*seen, path.resolve()))


def _override(values: dict[str, dict[str, Any]], argument: str) -> None:
    """Applies one `section.field=value`."""
    name, equals, text = argument.partition("=")
    section_name, dot, field = name.partition(".")
    if not (equals and dot and field):
        raise BadInput("argument", argument, "overrides have the form section.field=value, after the preset's name")
    try:
        value = yaml.safe_load(text) if text else ""
    except yaml.YAMLError as error:
        raise BadInput(name, text, "not readable as a YAML value; quote it") from error
    values.setdefault(section_name, {})[field] = value


def validate(values: dict[str, Any]) -> Config:
    """Sections of plain values to a checked Config."""
    try:
        return TypeAdapter(Config).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"][:2])
        raise BadInput(name, first["input"], _mend(first["type"], name, first["msg"])) from error


def _mend(kind: str, name: str, message: str) -> str:
    """What to do about a validation error: the nearest field name, or pydantic's own words."""
    if kind not in ("unexpected_keyword_argument", "extra_forbidden"):
        return message[0].lower() + message[1:]
    known = field_names()
    sections = [part.name for part in fields(Config)]
    nearest = difflib.get_close_matches(name, known if "." in name else sections, n=1, cutoff=0.0)[0]
    return f"no such field; nearest: {nearest}"


def field_names() -> list[str]:
    """Every `section.field`."""
    return [f"{part.name}.{field}" for part in fields(Config) for field in asdict(Config())[part.name]]


def to_yaml(config: Config) -> str:
    """The whole configuration, from which a new run can be started."""
    values = asdict(config)
    values["run"]["resume"] = False
    return yaml.safe_dump(plain(values), sort_keys=False)


def plain(value: Any) -> Any:
    """Tuples as lists, so that YAML stays plain."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return list(value) if isinstance(value, tuple) else value
