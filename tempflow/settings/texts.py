"""Which fields hold words, and which of these are paths: `run.dir=007` is a folder, not the number 7."""

from __future__ import annotations

from functools import cache
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

from tempflow.common.errors import BadInput
from tempflow.common.files import user_path
from tempflow.common.yaml_values import Unreadable, check_word, read_word
from tempflow.settings.fields import Config

PATHS = ("model.path", "model.lora", "model.text_cache", "tails.decoder", "prompts.train", "prompts.test",
         "reward.token_file", "run.dir")  # fmt: skip
NULLS = ("null", "Null", "NULL")


@cache
def members(name: str) -> tuple[Any, ...]:
    """The types that the field `section.field` may have, bare; none for a field that does not exist."""
    section, _, field = name.partition(".")
    kind = get_type_hints(Config).get(section)
    hints = get_type_hints(kind) if kind else {}
    return _bare(hints[field]) if field in hints else ()


def _bare(annotation: Any) -> tuple[Any, ...]:
    """The members of a union without what is said about them."""
    if get_origin(annotation) is Annotated:
        return _bare(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return tuple(member for part in get_args(annotation) for member in _bare(part))
    return (annotation,)


def is_text(place: tuple[Any, ...]) -> bool:
    """Whether a single value at a place of a settings file, (section, field, ...), is a word whatever it looks like."""
    section, field, *deeper = (*place, "", "")[: max(len(place), 2)]
    found = members(f"{section}.{field}")
    if len(deeper) == 1:
        return any(get_origin(kind) is list and _bare(get_args(kind)[0]) == (str,) for kind in found)
    return not deeper and str in found and not {int, float, bool} & set(found)


def read_override(name: str, text: str) -> Any:
    """The value of `section.field=text`. Of a field that holds words, the text as it stands, unless it is quoted.

    Raises:
        BadInput: naming the field.
    """
    place, found = tuple(name.split(".")), members(name)
    try:
        if not text or (is_text(place) and _is_plain(text, found)):
            return check_word(text)
        return read_word(text, lambda deeper: is_text((*place, *deeper)))
    except Unreadable as error:
        raise BadInput(name, text, f"not readable as a YAML value ({error}); quote it") from error


def _is_plain(text: str, found: tuple[Any, ...]) -> bool:
    """Whether a text for a field that holds words is neither quoted nor null, nor a list where it may be one."""
    lists = any(get_origin(kind) in (list, dict) for kind in found)
    empty = text in NULLS or (text == "~" and type(None) in found)
    return not (empty or text[0] in "'\"" or (lists and text[0] in "[{"))


def check_paths(config: Config) -> None:
    """Refuses paths that cannot be those of any file.

    Raises:
        BadInput: naming the field.
    """
    for name in PATHS:
        section, field = name.split(".")
        value = getattr(getattr(config, section), field)
        if value == "":
            raise BadInput(name, "", "is empty; give a path")
        if value is not None:
            user_path(name, value)
