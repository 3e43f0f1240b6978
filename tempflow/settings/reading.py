"""Reading a configuration: stacked presets and YAML files, then overrides.

`load(["flux1_dev", "g2rpo", "hpsv3", "learn.lr=1e-4"])`: names of presets and files, each laid on those before it, then
`section.field=value`. Without any name the stack is the preset `digits_even`; methods alone lie on `digits`. An unknown
or ill-typed field is refused with the nearest name. The fields themselves stand in `fields.py`, presets in `presets/`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from pydantic import TypeAdapter, ValidationError

from tempflow.common import yaml_values
from tempflow.common.errors import BadInput
from tempflow.settings.fields import Config
from tempflow.settings.names import changeable_fields, field_names, nearest_field, refuse_old_names
from tempflow.settings.stacks import kind_of, presets, read_stack, read_values
from tempflow.settings.texts import check_paths, read_override

__all__ = [
    "changeable_fields", "field_names", "is_override", "load", "plain", "presets", "read_values", "to_yaml", "validate",
]  # fmt: skip


def load(arguments: Sequence[str]) -> Config:
    """The configuration of a command line: names of presets and YAML files first, then overrides.

    Raises:
        BadInput: unknown preset, presets that exclude one another, unreadable YAML, unknown or ill-typed field.
    """
    arguments = list(arguments)
    count = next((place for place, argument in enumerate(arguments) if is_override(argument)), len(arguments))
    names, overrides = arguments[:count], arguments[count:]
    stack = read_stack(_with_base(names))
    values = stack.values
    for override in overrides:
        _override(values, override)
    _settle_if_taken(values, "run.dir" in stack.own or any(override.startswith("run.dir=") for override in overrides))
    config = validate(values)
    check_paths(config)
    return config


def is_override(argument: str) -> bool:
    """Whether an argument is `section.field=value`; a file may have `=` in the name of its folder."""
    name, equals, _ = argument.partition("=")
    return bool(equals) and "/" not in name


def _with_base(names: Sequence[str]) -> list[str]:
    """A stack that has something to lie on: the default run where nothing is named, `digits` under methods alone."""
    known = presets()
    alone = all(name in known and kind_of(known[name]) == "methods" for name in names)
    return ["digits" if names else "digits_even", *names] if alone else list(names)


def _settle_if_taken(values: dict[str, dict[str, Any]], chosen: bool) -> None:
    """What `run.if_taken=auto` means: a folder that the user chose is taken as it was meant."""
    run = values.setdefault("run", {})
    if run.get("if_taken", "auto") == "auto":
        run["if_taken"] = "refuse" if chosen else "number"


def _override(values: dict[str, dict[str, Any]], argument: str) -> None:
    """Applies one `section.field=value`."""
    name, _, text = argument.partition("=")
    if not is_override(argument):
        raise BadInput("argument", argument, "names of presets and files come before all settings")
    section, dot, field = name.partition(".")
    if not (section and dot and field):
        raise BadInput("argument", argument, "settings have the form section.field=value")
    refuse_old_names({section: {field: text}})
    values.setdefault(section, {})[field] = read_override(name, text)


def validate(values: dict[str, Any]) -> Config:
    """Sections of plain values to a checked Config. Types are those of JSON: no text or truth value is a number.

    Raises:
        BadInput: unknown or ill-typed field.
    """
    try:
        return TypeAdapter(Config).validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        errors = [(".".join(str(part) for part in each["loc"][:2]), each) for each in error.errors()]
        name, first = errors[0]
        if first["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
            raise _unknown(name, first["input"]) from error
        messages = dict.fromkeys(each["msg"] for found, each in errors if found == name)
        hint = ", or ".join(message[0].lower() + message[1:] for message in messages)
        raise BadInput(name, first["input"], hint) from error


def _unknown(name: str, value: Any) -> BadInput:
    """The refusal of a field that does not exist, or of a section, by the first field in it."""
    if "." not in name and isinstance(value, dict) and value:
        field, value = next(iter(value.items()))
        name = f"{name}.{field}"
    return BadInput(name, value, f"no such field; nearest: {nearest_field(name)}")


def to_yaml(config: Config) -> str:
    """The whole configuration, from which a new run can be started."""
    values = asdict(config)
    values["run"]["resume"] = False
    return yaml_values.to_yaml(plain(values))


def plain(value: Any) -> Any:
    """Tuples as lists, so that YAML stays plain."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return list(value) if isinstance(value, tuple) else value
