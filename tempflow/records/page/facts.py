"""Settings of a run, those of its own first, and the files that it has left."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tempflow.common.errors import BadInput
from tempflow.settings.fields import Config
from tempflow.settings.reading import plain, read_values

MOST_FILES = 300


@dataclass(frozen=True)
class Setting:
    """One field, in words."""

    name: str
    value: str
    default: str


@dataclass(frozen=True)
class SettingsTable:
    """All settings of a run."""

    own: Sequence[Setting] = ()
    """those that are not the defaults"""
    others: Sequence[Setting] = ()
    problem: str = ""
    """why there are none"""


@dataclass(frozen=True)
class SavedFile:
    """A file of the run's folder, or all files of a folder in it."""

    name: str
    size: int
    """bytes"""
    files: int

    @property
    def words(self) -> str:
        """Its size."""
        for unit, power in (("GB", 9), ("MB", 6), ("kB", 3)):
            if self.size >= 10**power:
                return f"{self.size / 10**power:.3g} {unit}"
        return f"{self.size} bytes"


def settings_table(path: Path) -> SettingsTable:
    """The settings in a config.yaml; one that cannot be read is no reason to show nothing else."""
    if not path.is_file():
        return SettingsTable(problem=f"there is no {path.name}")
    try:
        values = _flat(read_values(str(path)))
    except BadInput as error:
        return SettingsTable(problem=str(error))
    defaults = _flat(plain(asdict(Config())))
    rows = [Setting(name, _words(value), _words(defaults.get(name))) for name, value in values.items()]
    own = [row for row in rows if row.value != row.default]
    return SettingsTable(own, [row for row in rows if row.value == row.default])


def _flat(sections: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """`section.field` -> value."""
    return {f"{name}.{field}": plain(value) for name, part in sections.items() for field, value in part.items()}


def _words(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(plain(value), ensure_ascii=False, default=list)


def saved_files(folder: Path) -> list[SavedFile]:
    """What lies in the folder, checkpoints one by one."""
    left_out = (".", "checkpoints", "report.html")
    entries = [path for path in sorted(folder.iterdir()) if not path.name.startswith(left_out)]
    paths = [*sorted((folder / "checkpoints").glob("step_*")), *entries]
    return [_saved(path, path.relative_to(folder).as_posix()) for path in paths[:MOST_FILES]]


def _saved(path: Path, name: str) -> SavedFile:
    inside = path.is_dir() and not path.is_symlink()
    sizes = [_size(part) for part in path.rglob("*") if not part.is_dir()] if inside else [_size(path)]
    return SavedFile(f"{name}/" if inside else name, sum(sizes), len(sizes))


def _size(path: Path) -> int:
    """Bytes of a file; none of one that has just gone, as files of a tracker at work may."""
    try:
        return path.lstat().st_size
    except FileNotFoundError:
        return 0
