"""All settings that the runs of a folder were made with, kept beside their results: presets change, results do not.

shared: {sample: {steps: 6, ...}, ...}           of all runs
runs: {tempflow: {learn: {lr: 0.006}}, ...}      what each has of its own
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
from tempflow.studies.compare.study import Study, configuration

RESOLVED = "settings.yaml"
"""Its name in a study's folder."""
ENDS = ("learn.iterations", "learn.max_seconds")
"""A study sets them by its budget."""

Values = dict[str, Any]
"""section.field -> value"""


def resolved(config: Config) -> Values:
    """What a run's results are a function of, but for its seed and its end."""
    values = plain(asdict(config))
    flat = {f"{section}.{field}": value for section, part in values.items() for field, value in part.items()}
    return {name: value for name, value in flat.items() if name not in ENDS and not name.startswith("run.")}


def as_text(values: Values) -> str:
    """The same text for the same settings."""
    return json.dumps(values, sort_keys=True)


def write_resolved(study: Study, folder: Path) -> None:
    """Keeps the settings of all runs of a study."""
    own = {run: resolved(configuration(study, run)) for run in study.runs}
    first = next(iter(own.values()))
    shared = {name: value for name, value in first.items() if all(values[name] == value for values in own.values())}
    runs = {run: _nested((name, values[name]) for name in values.keys() - shared.keys()) for run, values in own.items()}
    write_atomically(folder / RESOLVED, to_yaml({"shared": _nested(shared.items()), "runs": runs}).encode())


def read_resolved(path: Path) -> dict[str, Values | None]:
    """Run -> what it was made with; None where this version has no such settings any more. A setting that came later
    has the value which it has where nothing is said.

    Raises:
        BadInput: the file holds something else.
    """
    content = read_yaml_file("study", path)
    try:
        return {run: _whole(content["shared"], own) for run, own in content["runs"].items()}
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise BadInput("study", path, "is not what a study wrote; remove it, or its folder") from error


def check_resolved(study: Study, folder: Path) -> None:
    """The results in a study's folder were made with the settings that its runs have now.

    Raises:
        BadInput: they were not, as when a preset or a file of settings has changed since.
    """
    path, may_change = folder / RESOLVED, changeable_fields()
    before = read_resolved(path) if path.is_file() else {}
    for run in before.keys() & study.runs.keys():
        now, hint = resolved(configuration(study, run)), "give the study another name"
        if (made := before[run]) is None:
            raise BadInput(f"runs.{run}", run, f"the results in {folder} are of another version's settings; {hint}")
        for name, value in now.items():
            if name not in may_change and value != made[name]:
                hint = f"the results in {folder} were made with {made[name]}; {hint}"
                raise BadInput(f"runs.{run}", f"{name}={value}", hint)


def _nested(values: Iterable[tuple[str, Any]]) -> dict[str, dict[str, Any]]:
    """By section."""
    sections: dict[str, dict[str, Any]] = {}
    for name, value in sorted(values):
        section, _, field = name.partition(".")
        sections.setdefault(section, {})[field] = value
    return sections


def _whole(shared: Mapping[str, Mapping[str, Any]], own: Mapping[str, Mapping[str, Any]]) -> Values | None:
    both = {section: {**shared.get(section, {}), **own.get(section, {})} for section in {**shared, **own}}
    try:
        return resolved(validate(both))
    except BadInput:
        return None
