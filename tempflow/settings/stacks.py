"""Presets and YAML files, and how they are stacked: each states only what it changes in those below it.

A file holds sections of fields. `extends:` names one preset or file, or a list of them, that it lies on; a relative
file is sought beside the file that names it. Presets are files in the folders of `presets/`, one folder a kind:

    models   a pipeline, its precision, guidance and batch sizes
    tasks    prompts, rewards and the length of a run
    methods  what distinguishes one published method from another
    runs     a model and a task, with the numbers of certain GPUs

A stack has one model and one method at most, and no preset may change what a method before it sets: that would be half
a method. A method with `on_top: true` at the top of its file is an add-on, which is there to do just that.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tempflow.common.errors import BadInput
from tempflow.common.files import PACKAGE, user_path
from tempflow.common.yaml_values import read_yaml_file
from tempflow.settings.names import field_names, nearest, refuse_old_names
from tempflow.settings.texts import is_text

FOLDER = PACKAGE / "settings" / "presets"
KINDS = ("models", "tasks", "methods", "runs")
ONE_OF = {
    "models": "leave one out (a run brings its model: take a task instead), or keep one and set model.path=...",
    "methods": "leave one out, and set single fields by section.field=value",
}
"""Kinds of which a stack has one at most, and what to do about two."""


@dataclass(frozen=True)
class Layer:
    """Sections of fields, and what they come from."""

    values: dict[str, dict[str, Any]] = field(default_factory=dict)
    name: str = ""
    kind: str = ""
    """of a preset, or `add-ons`; empty for a user's file"""
    brings: tuple[tuple[str, str], ...] = ()
    """(kind, name) of the models and methods in it, from bottom to top"""
    held: dict[str, tuple[Any, str]] = field(default_factory=dict)
    """`section.field` -> the value that a method or add-on gives it, and whose it is"""
    own: frozenset[str] = frozenset()
    """`section.field` that a file of the user's states, not a preset"""

    def flat(self) -> dict[str, Any]:
        """`section.field` -> value."""
        return {f"{name}.{key}": value for name, part in self.values.items() for key, value in part.items()}

    def names(self, kind: str) -> list[str]:
        """The models or methods in it, each once."""
        return list(dict.fromkeys(name for found, name in self.brings if found == kind))


def presets() -> dict[str, Path]:
    """Name -> file of every preset that ships with the package, by kind."""
    return {path.stem: path for kind in KINDS for path in sorted((FOLDER / kind).glob("*.yaml"))}


def names_of(kind: str) -> list[str]:
    """The presets of one kind."""
    return [name for name, path in presets().items() if kind_of(path) == kind]


def kind_of(path: Path) -> str:
    """The kind of a preset's file; empty for any other file."""
    folder = path.resolve().parent
    return folder.name if folder.parent == FOLDER else ""


def read_values(source: str) -> dict[str, dict[str, Any]]:
    """The sections of a preset or YAML file, on top of those it extends."""
    return read_stack([source]).values


def read_stack(sources: Iterable[str]) -> Layer:
    """Presets and files, from bottom to top, as one layer.

    Raises:
        BadInput: one that is missing or unreadable, or presets that exclude one another.
    """
    return _stacked([_read(_find(source), ()) for source in sources])


def _find(name: str, beside: Path | None = None) -> Path:
    """The file of a preset's name or of a path, which may be relative to `beside`, the file that extends it."""
    field, place = ("extends", f"in {beside}: ") if beside else ("preset", "")
    path = presets().get(name) or (beside.parent if beside else Path()) / user_path(field, name)
    if user_path(field, path).exists():
        return path
    if path.suffix in (".yaml", ".yml") or "/" in name:
        raise BadInput(field, name, f"{place}no such file")
    known = [*presets(), *(f"{setting}=" for setting in field_names())]
    raise BadInput(field, name, f"{place}no such preset or file; nearest: {nearest(name, known)}")


def _read(path: Path, seen: tuple[Path, ...]) -> Layer:
    """One file on top of those it extends; `seen` are the files that extend it."""
    if path.resolve() in seen:
        raise BadInput("extends", path, "presets extend each other in a circle")
    content, kind = _content(path), kind_of(path)
    below = _stacked([_read(_find(name, path), (*seen, path.resolve())) for name in _parents(content, path)])
    if kind == "methods" and content.pop("on_top", False) is True:
        kind = "add-ons"
    own = Layer(_sections(content, path))
    stated = frozenset() if kind else frozenset(own.flat())
    layer = Layer(_merged([below, own]), path.stem, kind, below.brings, below.held, below.own | stated)
    if kind == "models":
        return replace(layer, brings=((kind, layer.name),))
    if kind in ("methods", "add-ons"):  # whatever it extends, it is one method
        held = {name: (value, layer.name) for name, value in layer.flat().items()}
        return replace(layer, brings=((kind, layer.name),), held=held)
    return layer


def _content(path: Path) -> dict[Any, Any]:
    """What a YAML file holds."""
    content = read_yaml_file("preset", path, is_text)
    content = {} if content is None else content
    if not isinstance(content, dict):
        raise BadInput("preset", path, "holds no sections of fields, such as `learn: {lr: 0.001}`")
    return content


def _parents(content: dict[Any, Any], path: Path) -> list[str]:
    """Names of what a file extends, taken out of its content."""
    names = content.pop("extends", [])
    names = [names] if isinstance(names, str) else names
    if not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise BadInput("extends", names, f"in {path}: give the name of a preset or YAML file, or a list of names")
    return names


def _sections(content: dict[Any, Any], path: Path) -> dict[str, dict[str, Any]]:
    """The sections of a file, none of them with a name of older versions."""
    values = {str(name): {} if part is None else part for name, part in content.items()}
    for name, part in values.items():
        if not isinstance(part, dict):
            raise BadInput(name, part, f"in {path}: a section holds fields, such as `learn: {{lr: 0.001}}`")
    refuse_old_names(values, f"in {path}: ")
    return {name: {str(field): value for field, value in part.items()} for name, part in values.items()}


def _merged(layers: Iterable[Layer]) -> dict[str, dict[str, Any]]:
    """The sections of layers from bottom to top."""
    values: dict[str, dict[str, Any]] = {}
    for layer in layers:
        for name, part in layer.values.items():
            values[name] = values.get(name, {}) | part
    return values


def _stacked(layers: Sequence[Layer]) -> Layer:
    """Layers from bottom to top as one."""
    names = " ".join(layer.name for layer in layers)
    held: dict[str, tuple[Any, str]] = {}
    brings = tuple(entry for layer in layers for entry in layer.brings)
    stack = Layer(_merged(layers), names, "", brings, held, frozenset().union(*(layer.own for layer in layers)))
    for kind, hint in ONE_OF.items():
        found = stack.names(kind)
        if len(found) > 1:
            raise BadInput("preset", names, f"two {kind}, {found[0]} and {found[1]}; {hint}")
    for layer in layers:
        _check_held(held, layer, names)
        held |= layer.held
    return stack


def _check_held(held: dict[str, tuple[Any, str]], layer: Layer, stack: str) -> None:
    """A preset changes nothing of what methods before it hold; add-ons and a user's own files may."""
    if layer.kind in ("", "add-ons"):
        return
    for name, value in layer.flat().items():
        before, method = held.get(name, (value, ""))
        if before != value:
            hint = f"{layer.name} would change {name} of {method}, from {before} to {value}; name {method} after it"
            raise BadInput("preset", stack, hint)
