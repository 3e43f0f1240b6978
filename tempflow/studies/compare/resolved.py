"""All settings that the results of a folder were made with, kept beside them: presets change, results do not.

shared: {sample: {steps: 6, ...}, ...}           of all runs
runs: {tempflow: {learn: {lr: 0.006}}, ...}      what each has of its own

Not in it: the seed, the end, folders and trackers, which are no settings of a result. Seeds of one run agree in all
that a resumed run has to keep; in the rest (`tails.rows`, `eval.every` and the like) the first ones are told.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tempflow.common.errors import BadInput
from tempflow.common.files import write_atomically
from tempflow.common.yaml_values import read_yaml_file, to_yaml
from tempflow.settings.fields import Config
from tempflow.settings.reading import changeable_fields, plain, validate

RESOLVED = "settings.yaml"
"""Its name in a study's folder."""
ENDS = ("learn.iterations", "learn.max_seconds")
"""A study sets them by its budget."""
OF_RUN = ("run.device", "run.noise")
"""What of this section numbers depend on."""
OTHER_NAME = "give the study another name, or another --folder"

Values = dict[str, Any]
"""section.field -> value"""


def resolved(config: Config) -> Values:
    """What a run's results are a function of, but for its seed and its end."""
    values = plain(asdict(config))
    flat = {f"{section}.{field}": value for section, part in values.items() for field, value in part.items()}
    return {name: value for name, value in flat.items()
            if name in OF_RUN or not (name in ENDS or name.startswith("run."))}  # fmt: skip


def as_text(values: Values) -> str:
    """The same text for the same settings."""
    return json.dumps(values, sort_keys=True)


def write_resolved(made_with: Mapping[str, Values], folder: Path) -> None:
    """Keeps what each run was made with."""
    texts = {run: {name: json.dumps(value) for name, value in own.items()} for run, own in made_with.items()}
    first = next(iter(made_with.values()), {})
    shared = {name: value for name, value in first.items()
              if all(own[name] == json.dumps(value) for own in texts.values())}  # fmt: skip
    runs = {run: _nested((name, value) for name, value in own.items() if name not in shared)
            for run, own in made_with.items()}  # fmt: skip
    write_atomically(folder / RESOLVED, to_yaml({"shared": _nested(shared.items()), "runs": runs}).encode())


def read_resolved(folder: Path) -> dict[str, Values | BadInput]:
    """Run -> what it was made with, or what this version has no more of it; nothing where no file is. A setting that
    came later has the value which it has where nothing is said.

    Raises:
        BadInput: the file holds something else.
    """
    path = folder / RESOLVED
    if not path.exists():
        return {}
    content = read_yaml_file("study", path)
    try:
        return {run: _whole(content["shared"], own) for run, own in content["runs"].items()}
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise BadInput("study", path, "is not what a study wrote; put that back, or move its folder away") from error


def check_resolved(run: str, now: Values, before: Values | BadInput, folder: Path) -> None:
    """A run whose results are in a folder has the settings that they were made with, but for what may change in a run
    that is resumed.

    Raises:
        BadInput: it has not, as when a preset or a file of settings was changed since.
    """
    if isinstance(before, BadInput):
        hint = f"the results in {folder} were made with {before.field}={_shown(before.value)}, which is gone"
        raise BadInput("runs", run, f"{hint}; {OTHER_NAME}")
    may_change = changeable_fields()
    for name, value in now.items():
        if name not in may_change and json.dumps(value) != json.dumps(before[name]):
            hint = f"the results in {folder} were made with {_shown(before[name])}; {OTHER_NAME}"
            raise BadInput(f"runs.{run}", f"{name}={_shown(value)}", hint)


def _shown(value: Any) -> str:
    """As a user writes it."""
    return value if isinstance(value, str) else json.dumps(value)


def _nested(values: Iterable[tuple[str, Any]]) -> dict[str, dict[str, Any]]:
    """By section."""
    sections: dict[str, dict[str, Any]] = {}
    for name, value in sorted(values, key=lambda pair: pair[0]):
        section, _, field = name.partition(".")
        sections.setdefault(section, {})[field] = value
    return sections


def _whole(shared: Mapping[str, Mapping[str, Any]], own: Mapping[str, Mapping[str, Any]]) -> Values | BadInput:
    both = {section: {**shared.get(section, {}), **own.get(section, {})} for section in {**shared, **own}}
    try:
        return resolved(validate(both))
    except BadInput as error:
        return error
