"""Names of fields: all there are, those that may change on resume, and what became of names of older versions."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

from pydantic.fields import FieldInfo

from tempflow.common.errors import BadInput
from tempflow.settings.fields import Config

RENAMED = {
    "branch.steps": "explore.forks",
    "branch.prompts": "explore.prompts",
    "branch.seeds": "explore.noises",
    "branch.siblings": "explore.siblings",
    "branch.rows": "tails.rows",
    "branch.decode_rows": "reward.rows",
    "branch.overlap": "reward.overlap",
    "learn.clip_range": "objective.clip",
    "learn.weighting": "objective.weighting",
    "learn.group": "credit.group",
    "learn.advantage_std": "credit.std",
    "learn.advantage_clip": "credit.clip",
    "learn.kl": "objective.kl",
    "learn.kl_divisor": "objective.kl_divisor",
}
"""Fields of older versions, such as those in the config.yaml of an old run, and what they are called now."""


def described(config: Config) -> dict[str, tuple[Any, FieldInfo]]:
    """`section.field` -> its value in `config`, and what its class says of it, in the order of the classes."""
    found = {}
    for part in fields(config):
        values = getattr(config, part.name)
        for name, info in type(values).__pydantic_fields__.items():
            found[f"{part.name}.{name}"] = getattr(values, name), info
    return found


def field_names() -> list[str]:
    """Every `section.field`."""
    return list(described(Config()))


def changeable_fields() -> set[str]:
    """Every `section.field` that may differ when a run is resumed."""
    marks = {name: info.json_schema_extra for name, (_, info) in described(Config()).items()}
    return {name for name, mark in marks.items() if isinstance(mark, dict) and mark.get("changeable") is True}


def nearest(name: str, known: Iterable[str]) -> str:
    """The one of `known` that is spelt most like `name`."""
    return difflib.get_close_matches(name, list(known), n=1, cutoff=0.0)[0]


def nearest_field(name: str) -> str:
    """The field or section, by its name of today, that is spelt most like `name`."""
    if "." not in name:
        return nearest(name, [part.name for part in fields(Config)])
    found = nearest(name, [*field_names(), *RENAMED])
    return RENAMED.get(found, found)


def refuse_old_names(values: Mapping[str, Mapping[str, Any]], place: str = "") -> None:
    """Answers names of older versions with those of today; `place` says where they stand.

    Raises:
        BadInput: for the first of them; its line tells of the others too.
    """
    given = {f"{section}.{field}": value for section, part in values.items() for field, value in part.items()}
    old = [name for name in given if name in RENAMED]
    if old:
        others = ", ".join(f"{name} -> {RENAMED[name]}" for name in old[1:])
        more = f" (and {others})" if others else ""
        raise BadInput(old[0], given[old[0]], f"{place}is now called {RENAMED[old[0]]}{more}")
