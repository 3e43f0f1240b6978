"""Presets and YAML files, and how they are stacked: each states only what it changes in those below it.

A file holds sections of fields. `extends:` names one preset or file, or a list of them, that it lies on; a relative
file is sought beside the file that names it. Presets are files in the folders of `presets/`, one folder a kind:

    models   a pipeline, its precision, guidance and batch sizes
    tasks    prompts, rewards and the length of a run
    methods  what distinguishes one published method from another
    runs     a model and a task, with the numbers of certain GPUs

A stack has one model and one method at most. A method with `on_top: true` at the top of its file is an add-on: it
changes a few fields of any method, and comes after it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tempflow.common.errors import BadInput
from tempflow.common.files import PACKAGE
from tempflow.settings.names import nearest, refuse_old_names

FOLDER = PACKAGE / "settings" / "presets"
KINDS = ("models", "tasks", "methods", "runs")


@dataclass(frozen=True)
class Layer:
    """Sections of fields, and the models, methods and add-ons they come from, from bottom to top."""

    values: dict[str, dict[str, Any]]
    brings: tuple[tuple[str, str], ...] = ()

    def names(self, kind: str) -> list[str]:
        """Those of one kind, each once."""
        return list(dict.fromkeys(name for found, name in self.brings if found == kind))


def presets() -> dict[str, Path]:
    """Name -> file of every preset that ships with the package, by kind."""
    return {path.stem: path for kind in KINDS for path in sorted((FOLDER / kind).glob("*.yaml"))}


def kind_of(path: Path) -> str:
    """The kind of a preset's file; empty for any other file."""
    return path.parent.name if path.parent.parent == FOLDER else ""


def read_values(source: str) -> dict[str, dict[str, Any]]:
    """The sections of a preset or YAML file, on top of those it extends."""
    return read_stack([source]).values


def read_stack(sources: Iterable[str]) -> Layer:
    """Presets and files, from bottom to top, as one layer.

    Raises:
        BadInput: one that is missing or unreadable, or two models or methods that exclude one another.
    """
    sources = list(sources)
    layer = _stacked([_read(_find(source), ()) for source in sources])
    _check_choices(layer, " ".join(sources))
    return layer


def _find(name: str, beside: Path | None = None) -> Path:
    """The file of a preset's name or of a path, which may be relative to `beside`, the file that extends it."""
    path = presets().get(name) or (beside.parent if beside else Path()) / Path(name).expanduser()
    if path.is_file():
        return path
    field, place = ("extends", f"in {beside}: ") if beside else ("preset", "")
    if path.suffix in (".yaml", ".yml") or "/" in name:
        raise BadInput(field, name, f"{place}no such file")
    mend = f"no such preset or file; nearest: {nearest(name, presets())}. Settings have the form section.field=value"
    raise BadInput(field, name, place + mend)


def _read(path: Path, seen: tuple[Path, ...]) -> Layer:
    """One file on top of those it extends; `seen` are the files that extend it."""
    if path.resolve() in seen:
        raise BadInput("extends", path, "presets extend each other in a circle")
    content, kind = _content(path), kind_of(path)
    below = _stacked([_read(_find(name, path), (*seen, path.resolve())) for name in _parents(content, path)])
    if kind == "methods" and content.pop("on_top", False) is True:
        kind = "add-ons"
    values = _sections(content, path)
    inherited = tuple(entry for entry in below.brings if entry[0] != kind)
    own = ((kind, path.stem),) if kind in ("models", "methods", "add-ons") else ()
    return _stacked([Layer(below.values, inherited), Layer(values, own)])


def _content(path: Path) -> dict[Any, Any]:
    """What a YAML file holds."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise BadInput("preset", path, f"not readable as YAML ({' '.join(str(error).split())})") from error
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


def _stacked(layers: Iterable[Layer]) -> Layer:
    """Layers from bottom to top as one."""
    values: dict[str, dict[str, Any]] = {}
    brings: tuple[tuple[str, str], ...] = ()
    for layer in layers:
        brings += layer.brings
        for name, part in layer.values.items():
            values[name] = values.get(name, {}) | part
    return Layer(values, brings)


def _check_choices(layer: Layer, stack: str) -> None:
    """One model and one method at most, and add-ons above it."""
    for kind, others in (("models", "a task instead of a run, or model.path=..."), ("methods", "single fields")):
        names = layer.names(kind)
        if len(names) > 1:
            raise BadInput("preset", stack, f"two {kind}, {names[0]} and {names[1]}; leave one out, and name {others}")
    kinds = [kind for kind, _ in layer.brings]
    above = kinds[kinds.index("add-ons") :] if "add-ons" in kinds else []
    if "methods" in above:
        add_on, method = layer.names("add-ons")[0], layer.names("methods")[0]
        raise BadInput("preset", stack, f"{add_on} changes what a method sets, so name it after {method}")
