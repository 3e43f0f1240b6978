"""The folder of a run whose user chose none: the first command can be given twice.

Where `runs/digits` holds a run, the next one goes to `runs/digits-2`, then `runs/digits-3`. `run.resume` goes on with
the newest of them. A number has three digits at most: `runs/digits-20261124` and `runs/digits-2026` are names that
somebody chose, beside which numbers go on as if they were not there.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import torch

from tempflow.common.errors import BadInput
from tempflow.common.say import say
from tempflow.parallel.ranks import Ranks
from tempflow.run.folder import is_free
from tempflow.settings.fields import Config

NUMBER = re.compile(r"-([1-9]\d{0,2})")
"""What follows the name of the first folder; longer ones are dates and years."""


def choose_folder(config: Config, ranks: Ranks) -> Config:
    """The settings with the folder that this run works in, by `run.if_taken`. Changes nothing on the disk.

    The first process looks and the others hear of it: what one of them may have made meanwhile does not count.

    Raises:
        BadInput: on all processes, where the folder is out of reach.
    """
    if config.run.if_taken != "number":
        return config
    base = Path(config.run.dir).expanduser()
    newest = ranks.agree(lambda: _newest(base, config.run.dir) if ranks.first else 0, "run.dir")
    newest = int(ranks.gather(torch.tensor([newest]), 0)[0])
    number = max(newest, 1) if config.run.resume else newest + 1
    folder, last = (_numbered(config.run.dir, each) for each in (number, newest))
    if number > max(newest, 1):
        say(f"{last} holds a run, so this one goes to {folder}; to go on with that: run.dir={last} run.resume=true")
    return replace(config, run=replace(config.run, dir=folder, if_taken="refuse"))


def _newest(base: Path, given: str) -> int:
    """The highest number of a folder in use, the one without a number being 1; 0 where there is none."""
    try:
        others = {path: NUMBER.fullmatch(path.name.removeprefix(base.name)) for path in _beside(base)}
        numbers = {path: int(found[1]) for path, found in others.items() if found} | {base: 1}
        return max((number for path, number in numbers.items() if path.exists() and not is_free(path)), default=0)
    except OSError as error:
        raise BadInput("run.dir", given, f"cannot be looked at ({error.strerror}); choose another folder") from error


def _beside(base: Path) -> list[Path]:
    """Files and folders whose names begin as the base's."""
    parent = base.parent
    return [path for path in parent.iterdir() if path.name.startswith(base.name)] if parent.is_dir() else []


def _numbered(folder: str, number: int) -> str:
    return f"{folder.rstrip('/')}-{number}" if number > 1 else folder
