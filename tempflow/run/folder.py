"""The folder of a run: opened only when nothing of an earlier run can be lost."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path

import torch

from tempflow.common.errors import BadInput
from tempflow.common.files import write_atomically
from tempflow.parallel.ranks import Ranks
from tempflow.settings.fields import Config
from tempflow.settings.reading import changeable_fields, read_values, to_yaml, validate


def check_folder(config: Config) -> None:
    """The folder is free for a new run, or holds the run to resume. Changes nothing.

    Raises:
        BadInput: a run is there already, there is none to resume, its settings differ, or the folder is out of reach.
    """
    folder = Path(config.run.dir).expanduser()
    try:
        if config.run.resume:
            check_same_run(config, folder)
        elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            hint = "exists already; continue it with run.resume=true or choose another run.dir"
            raise BadInput("run.dir", config.run.dir, hint)
        elif not _can_be_made(folder):
            raise BadInput("run.dir", config.run.dir, "cannot be written; choose another folder")
    except OSError as error:
        hint = f"cannot be used ({error.strerror}); choose another folder"
        raise BadInput("run.dir", config.run.dir, hint) from error


def _can_be_made(folder: Path) -> bool:
    """Whether the nearest folder that exists may be written to."""
    existing = next(part for part in (folder.absolute(), *folder.absolute().parents) if part.exists())
    return existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)


def write_settings(config: Config, ranks: Ranks) -> None:
    """Makes the folder and writes config.yaml, with which a new run like this one can be started.

    Raises:
        BadInput: on every rank, if the first cannot write.
    """
    folder, problem = Path(config.run.dir).expanduser(), ""
    if ranks.first:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(folder / "config.yaml", to_yaml(config).encode())
        except OSError as error:
            problem = error.strerror or str(error)
    failed = ranks.gather(torch.tensor([int(bool(problem))]), 0).any()
    if failed:
        raise BadInput("run.dir", config.run.dir, f"cannot be written ({problem}); choose another folder")


def check_same_run(config: Config, folder: Path) -> None:
    """The settings saved in the folder agree with `config`, unless nothing has been learnt there yet."""
    saved = folder / "config.yaml"
    if not saved.is_file():
        raise BadInput("run.resume", "true", f"there is no run in {config.run.dir} (no config.yaml)")
    if not any((folder / "checkpoints").glob("step_*")):
        return
    before, changeable = asdict(validate(read_values(str(saved)))), changeable_fields()
    for section, values in asdict(config).items():
        for field, value in values.items():
            name = f"{section}.{field}"
            if name not in changeable and value != before[section][field]:
                hint = f"the run in {config.run.dir} was started with {before[section][field]}; a resumed run keeps it"
                raise BadInput(name, value, hint)
