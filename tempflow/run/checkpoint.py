"""Checkpoints on disk: safetensors and JSON, each file with its checksum in an index that is written last.

A checkpoint is written beside the others, brought to the disk, and renamed: it is there whole or not at all. One that
was damaged later is named, and the one before is used.

Deviation: the released code saves adapters only and its resume cannot find them.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from tempflow.common.errors import BadInput
from tempflow.common.files import checksum, on_disk, write_atomically
from tempflow.common.say import say
from tempflow.learn.stepper import Stepper
from tempflow.parallel.ranks import Ranks
from tempflow.run.snapshot import PARTS, Progress, Snapshot, State, Unfit, check, check_numbers, put_back

INDEX, STATE, BEST = "index.json", "state.json", "best.json"
NAME = re.compile(r"step_\d{6,}")
ALONE = Ranks(0, 1, torch.device("cpu"))


def save(folder: Path, snapshot: Snapshot, keep: int) -> Path:
    """Writes `folder/step_N`; the newest `keep` stay, and the one with the best gold score.

    Raises:
        OSError: it cannot be written; those that were there are there still.
        Unfit: the snapshot holds values that are not finite.
    """
    check_numbers(snapshot)
    target = folder / f"step_{snapshot.progress.iteration:06d}"
    folder.mkdir(exist_ok=True)
    _clear(folder)
    partial = folder / f".{target.name}.partial"
    try:
        _write(partial, snapshot)
        if target.exists():  # of the same iteration, or damaged
            target.rename(folder / f".{target.name}.old")
        partial.rename(target)
        on_disk(folder)
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    _note_best(folder, target.name, snapshot.progress.gold)
    _drop(folder, snapshot.progress.iteration, keep)
    return target


def checkpoints(folder: Path) -> list[Path]:
    """Whatever is called a checkpoint, oldest first."""
    return sorted((path for path in folder.glob("step_*") if NAME.fullmatch(path.name)), key=iteration_of)


def restore(folder: Path, stepper: Stepper, ranks: Ranks = ALONE) -> Progress:
    """Loads the newest good checkpoint in `folder` into `stepper`; a folder without any leaves a run at its start.

    The first process chooses; the others read what it chose.

    Raises:
        BadInput: no checkpoint there can be used.
    """
    chosen = ranks.agree(lambda: _choose(folder, stepper) if ranks.first else None, "run.resume")
    iteration = int(ranks.largest(torch.tensor([chosen.progress.iteration if chosen else 0])))
    if not iteration:
        return Progress()
    name = f"step_{iteration:06d}"
    snapshot = ranks.agree(lambda: chosen or _read_again(folder / name, stepper), "run.resume")
    put_back(snapshot, stepper)
    return snapshot.progress


def _choose(folder: Path, stepper: Stepper) -> Snapshot | None:
    found, problems = checkpoints(folder), []
    for path in reversed(found):
        try:
            snapshot = read(path)
            check(snapshot, stepper)
        except Unfit as problem:
            problems.append(f"{path.name}: {problem}")
            if path != found[0]:
                say(f"the checkpoint {path} cannot be used ({problem}); trying the one before")
            continue
        return snapshot
    if found:
        hint = f"no checkpoint can be used ({'; '.join(problems)}); restore one, or begin anew in another run.dir"
        raise BadInput("run.resume", folder, hint)
    return None


def _read_again(path: Path, stepper: Stepper) -> Snapshot:
    try:
        snapshot = read(path)
        check(snapshot, stepper)
    except Unfit as problem:
        hint = f"the first process could read it, this one cannot ({problem}); run.dir has to be the same for all"
        raise BadInput("run.resume", path, hint) from problem
    return snapshot


def read(path: Path, parts: Sequence[str] = PARTS) -> Snapshot:
    """A checkpoint whose files are those that were written.

    Args:
        parts: those of its tensors that are wanted; the files of others are not looked at.
    Raises:
        Unfit: what is wrong with it.
    """
    try:
        sums = _checksums(path)
        for name in _files(parts):
            if checksum(path / name) != sums.get(name):
                raise Unfit(f"{name} is not what was written: its checksum differs")
        state = TypeAdapter(State).validate_json((path / STATE).read_bytes(), strict=True)
        tensors = {part: load_file(path / f"{part}.safetensors") for part in parts}
    except FileNotFoundError as error:
        raise Unfit(f"{Path(error.filename or path).name} is missing") from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise Unfit(f"{STATE}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    except (OSError, SafetensorError) as error:
        raise Unfit(str(error)) from error
    if state.progress.iteration != iteration_of(path):
        raise Unfit(f"it tells of iteration {state.progress.iteration}")
    return Snapshot(state, tensors)


def _files(parts: Sequence[str]) -> tuple[str, ...]:
    """The files of parts, and of what is no tensor."""
    return (*(f"{part}.safetensors" for part in parts), STATE)


def _checksums(path: Path) -> dict[str, str]:
    """name -> SHA-256, of the files of a checkpoint."""
    try:
        return TypeAdapter(dict[str, str]).validate_json((path / INDEX).read_bytes(), strict=True)
    except ValidationError as error:
        raise Unfit(f"{INDEX} is no index") from error


def _write(partial: Path, snapshot: Snapshot) -> None:
    """The files of a checkpoint, the index last, all of it on the disk."""
    partial.mkdir()
    for part, tensors in snapshot.tensors.items():
        _save_tensors(tensors, partial / f"{part}.safetensors")
    write_atomically(partial / STATE, json.dumps(asdict(snapshot.state)).encode())
    for name in _files(PARTS):
        on_disk(partial / name)
    sums = {name: checksum(partial / name) for name in _files(PARTS)}
    write_atomically(partial / INDEX, json.dumps(sums, indent=1).encode())
    on_disk(partial)


def _save_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    try:
        save_file(tensors, path)
    except SafetensorError as error:  # which is how the library tells of a full disk
        raise OSError(str(error)) from error


def iteration_of(path: Path) -> int:
    """The iteration that a checkpoint is named after."""
    return int(path.name[len("step_") :])


def best(folder: Path) -> tuple[str, float] | None:
    """Name and gold score of the checkpoint that `best.json` names, if it is there."""
    try:
        found = json.loads((folder / BEST).read_bytes())
        name, gold = str(found["checkpoint"]), float(found["gold"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return (name, gold) if NAME.fullmatch(name) and (folder / name).exists() else None


def _note_best(folder: Path, name: str, gold: float | None) -> None:
    """Keeps `best.json` up to date; a checkpoint that was not evaluated is none."""
    before = best(folder)
    if gold is not None and (before is None or before[0] == name or gold > before[1]):
        write_atomically(folder / BEST, json.dumps({"checkpoint": name, "gold": gold}).encode())


def _drop(folder: Path, now: int, keep: int) -> None:
    """Removes old checkpoints; newer ones, which could not be used or were given up, are set aside."""
    found = checkpoints(folder)
    for newer in [path for path in found if iteration_of(path) > now]:
        say(f"the checkpoint {newer} is of a later iteration and was not used; it is kept as unused_{newer.name}")
        _remove(folder / f"unused_{newer.name}")
        newer.rename(folder / f"unused_{newer.name}")
    kept = best(folder)
    for old in [path for path in found if iteration_of(path) <= now][:-keep]:
        if kept is None or old.name != kept[0]:
            _remove(old)


def _clear(folder: Path) -> None:
    """Removes parts that a kill left."""
    for part in (*folder.glob(".step_*.partial"), *folder.glob(".step_*.old"), *folder.glob(".step_*.going")):
        _remove(part)


def _remove(path: Path) -> None:
    """Removes a checkpoint under another name, so that a kill leaves no half of one; of a link only itself."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        going = path.with_name(f".{path.name.lstrip('.')}.going")
        path.rename(going)
        shutil.rmtree(going)
