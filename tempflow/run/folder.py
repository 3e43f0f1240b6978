"""The folder of a run: opened only when nothing of an earlier run can be lost."""

from __future__ import annotations

import json
import os
import shlex
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from tempflow.common.errors import BadInput
from tempflow.common.files import write_atomically
from tempflow.parallel.ranks import Ranks
from tempflow.records.rows import read_metrics
from tempflow.run.checkpoint import checkpoints
from tempflow.run.lock import NAME, FolderLock
from tempflow.settings.fields import Config
from tempflow.settings.reading import changeable_fields, plain, read_values, to_yaml, validate

SETTINGS, SAVED, METRICS, ERRORS = "config.yaml", "saved.json", "metrics.jsonl", "error*.txt"


def check_folder(config: Config) -> Config:
    """The folder is free for a new run, or holds the run to resume. Changes nothing.

    Returns:
        The settings with `run.resume` true or false, where it is auto.
    Raises:
        BadInput: a run is there already, there is none to resume, its settings differ, or the folder is out of reach.
    """
    folder = Path(config.run.dir).expanduser()
    try:
        resume = config.run.resume if config.run.resume != "auto" else (folder / SETTINGS).is_file()
        if resume:
            check_same_run(config, folder)
        elif folder.exists() and not is_free(folder):
            hint = "exists already; continue it with run.resume=true or choose another run.dir"
            raise BadInput("run.dir", config.run.dir, hint)
        elif not _can_be_made(folder):
            raise BadInput("run.dir", config.run.dir, "cannot be written; choose another folder")
    except OSError as error:
        hint = f"cannot be used ({error.strerror}); choose another folder"
        raise BadInput("run.dir", config.run.dir, hint) from error
    return replace(config, run=replace(config.run, resume=resume))


def is_free(folder: Path) -> bool:
    """Whether a folder holds nothing, or no more than what a run that never began leaves."""
    left = {folder / NAME, *folder.glob(ERRORS)} if folder.is_dir() else set()
    return folder.is_dir() and all(path in left for path in folder.iterdir())


def _can_be_made(folder: Path) -> bool:
    """Whether the nearest folder that exists may be written to."""
    existing = next(part for part in (folder.absolute(), *folder.absolute().parents) if part.exists())
    return existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)


def open_folder(config: Config, ranks: Ranks, lock: FolderLock) -> None:
    """Makes the folder where there is none, and locks it.

    Raises:
        BadInput: on every rank, if another process works there, has begun a run there meanwhile, or it is out of reach.
    """

    def work() -> None:
        if not ranks.first:
            return
        try:
            lock.folder.mkdir(parents=True, exist_ok=True)
            lock.take()
        except OSError as error:
            hint = f"cannot be written ({error.strerror}); choose another folder"
            raise BadInput("run.dir", config.run.dir, hint) from error
        if not config.run.resume and not is_free(lock.folder):
            raise BadInput("run.dir", config.run.dir, "another process has just begun a run there; choose another")

    ranks.agree(work, "run.dir")


def write_settings(config: Config, ranks: Ranks) -> None:
    """Writes config.yaml, with which a new run like this one can be started, into a folder that is there.

    Raises:
        BadInput: on every rank, if the first cannot write.
    """

    def work() -> None:
        folder = Path(config.run.dir).expanduser()
        if ranks.first:
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(folder / SETTINGS, to_yaml(config).encode())

    ranks.agree(work, "run.dir")


def check_same_run(config: Config, folder: Path) -> None:
    """The settings saved in the folder agree with `config`, unless nothing was learnt there yet, and what was saved is
    there still.

    Raises:
        BadInput: they do not, or there is no run.
    """
    saved, kept = folder / SETTINGS, folder / "checkpoints"
    if not saved.is_file():
        hint = f"there is no run in {config.run.dir} (no {SETTINGS}); run.resume=auto begins one where there is none"
        raise BadInput("run.resume", str(config.run.resume).lower(), hint)
    if kept.exists() and not kept.is_dir():
        raise BadInput("run.resume", str(config.run.resume).lower(), f"{kept} is no folder; put the checkpoints back")
    done = saved_iteration(folder)
    if done and not checkpoints(kept):
        hint = f"{done} iterations were saved in {config.run.dir}, but {kept} holds no checkpoint; put one back, or " \
               "choose another run.dir"  # fmt: skip
        raise BadInput("run.resume", str(config.run.resume).lower(), hint)
    if not (done or checkpoints(kept) or _has_learnt(folder)):
        return
    before, changeable = asdict(validate(read_values(str(saved)))), changeable_fields()
    for section, values in asdict(config).items():
        for field, value in values.items():
            name = f"{section}.{field}"
            if name not in changeable and value != before[section][field]:
                raise BadInput(name, value, _as_it_began(plain(before[section][field]), saved))


def _as_it_began(value: Any, saved: Path) -> str:
    """Why a setting cannot be another one, and how to go on."""
    began = value if isinstance(value, str) else json.dumps(value)
    going_on = f"`tempflow train {shlex.quote(str(saved))} run.resume=true` goes on with all its settings"
    return f"the run in {saved.parent} was started with {began}; a resumed run keeps it: {going_on}"


def _has_learnt(folder: Path) -> bool:
    """Whether a run has finished an iteration there."""
    return any(row["step"] > 0 for row in read_metrics(folder / METRICS))


def first_rows(folder: Path) -> int | None:
    """How many branches travelled together in a run that did not come to a checkpoint: it goes on alike."""
    rows = [row.get("tail_rows") for row in read_metrics(folder / METRICS)[:1]]
    return next((count for count in rows if isinstance(count, int) and count > 0), None)


def forget_errors(folder: Path) -> None:
    """Removes what earlier processes left of their failures."""
    for path in folder.glob(ERRORS):
        path.unlink(missing_ok=True)


def saved_iteration(folder: Path) -> int:
    """The iteration that was saved last, whether its checkpoint is there or not; 0 where none was."""
    try:
        return int(json.loads((folder / SAVED).read_bytes())["iteration"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def note_saved(folder: Path, iteration: int) -> None:
    """Leaves word that an iteration was saved, outside the folder of checkpoints."""
    write_atomically(folder / SAVED, json.dumps({"iteration": iteration}).encode())
