"""Writes parts of a run to a tracker through its own package, and reads back what that has stored.

python tracked_runs.py FOLDER TRACKER            a run of four iterations, which ends after its last checkpoint
python tracked_runs.py FOLDER TRACKER 3          goes on from the third, to the sixth
python tracked_runs.py FOLDER TRACKER stored     prints what is stored

What is stored is read by a process of its own: wandb's service may write the last records when a run has ended.
"""

from __future__ import annotations

import json
import os
import signal
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from tempflow.records.rows import EvaluationRow, IterationRow, MetricsWriter, StartRow
from tempflow.records.trackers import Trackers

PROMPTS = ["a <b>seven</b>", "two & three"]
SETTINGS = {"learn": {"lr": 0.001, "betas": (0.9, 0.999)}, "run": {"trackers": ["one"], "resume": False}}

Stored = dict[str, list]
"""name -> [step, value] of each point in the order in which it was stored; of `pictures` [step, width, height]"""


def start() -> StartRow:
    return StartRow(sigmas=[1.0, 0.5, 0.0], loss_weights=[1.0, 1.0], picture_prompts=PROMPTS, tail_rows=4)


def iteration(step: int) -> IterationRow:
    means = {"one": step / 8, "none": None}
    return IterationRow(step=step, seconds=10.0 * step, reward_mean=step / 8, reward_means=means,
                        reward_std_per_step=[0.25, None], rewards_missing=0, groups_masked=1, tail_waste=0.0,
                        grad_norm=0.5, optimizer_bytes=8, phase_seconds={"tails": 1.5})  # fmt: skip


def evaluation(step: int) -> EvaluationRow:
    return EvaluationRow(step=step, seconds=10.0 * step + 1, scores={"reward_test": step / 16, "gold": step / 32},
                         scores_missing=0, phase_seconds={"evaluate": 0.5})  # fmt: skip


def write(folder: Path, tracker: str, done: int | None, last: int) -> None:
    """Iterations from `done` to `last`, evaluated at every second one."""
    interrupts = signal.getsignal(signal.SIGINT)
    trackers = Trackers(folder, [tracker], "tempflow-tests", SETTINGS)
    writer = MetricsWriter(folder, done, trackers=trackers)
    if done is None:
        writer.write(start())
        writer.write(evaluation(0))
    for step in range((done or 0) + 1, last + 1):
        writer.write(iteration(step))
        if step % 2 == 0:
            writer.write(evaluation(step))
    assert signal.getsignal(signal.SIGINT) is interrupts, "Ctrl-C belongs to the run"
    writer.close()


def read_tensorboard(folder: Path) -> Stored:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"images": 0, "scalars": 0})
    events.Reload()
    found: Stored = {name: [[event.step, event.value] for event in events.Scalars(name)]
                     for name in events.Tags()["scalars"]}  # fmt: skip
    return found | {"pictures": [[event.step, event.width, event.height] for event in events.Images("pictures")]}


def records(path: Path) -> Iterator[bytes]:
    """The records of a file in LevelDB's log format: blocks of 32 KiB, in which long records are cut up."""
    data, place, record = path.read_bytes(), 7, b""
    while place + 7 <= len(data):
        if 2**15 - place % 2**15 < 7:
            place += 2**15 - place % 2**15
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        record += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


def read_wandb(folder: Path) -> Stored:
    from wandb.proto.wandb_internal_pb2 import Record

    found: Stored = {"ids": []}
    for file in sorted((folder / "wandb").glob("offline-run-*/*.wandb")):
        for data in records(file):
            record = Record.FromString(data)
            if record.HasField("run"):
                found["ids"].append(record.run.run_id)
            items = {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
            step = record.history.step.num
            if "pictures/path" in items:
                size = Image.open(file.parent / "files" / items["pictures/path"]).size
                found.setdefault("pictures", []).append([step, *size])
            for name, value in items.items():
                if not name.startswith(("_", "pictures/")):
                    found.setdefault(name, []).append([step, value])
    return found


def read_trackio(folder: Path) -> Stored:
    from trackio.sqlite_storage import SQLiteStorage

    project = "tempflow-tests"
    runs = SQLiteStorage.get_run_records(project)
    found: Stored = {"ids": [run["id"] for run in runs]}
    for row in SQLiteStorage.get_logs(project, runs[0]["name"]):
        step, picture = row.pop("step"), row.pop("pictures", None)
        row.pop("timestamp")
        if picture:
            size = Image.open(Path(os.environ["TRACKIO_DIR"], "media", picture["file_path"])).size
            found.setdefault("pictures", []).append([step, *size])
        for name, value in row.items():
            found.setdefault(name, []).append([step, value])
    return found


def read_swanlab(folder: Path) -> Stored:
    from swanlab.proto.swanlab.record.v1.record_pb2 import Record

    found: Stored = {"ids": []}
    for file in sorted((folder / "swanlab").glob("run-*/*.swanlab")):
        for data in records(file):
            record = Record.FromString(data)
            if record.HasField("start"):
                found["ids"].append(record.start.id)
            if record.HasField("scalar"):
                found.setdefault(record.scalar.key, []).append([record.scalar.step, record.scalar.value.number])
            for item in record.media.value.items:
                size = Image.open(file.parent / "media" / "image" / item.filename).size
                found.setdefault(record.media.key, []).append([record.media.step, *size])
    return found


READ = {"tensorboard": read_tensorboard, "wandb": read_wandb, "trackio": read_trackio, "swanlab": read_swanlab}

if __name__ == "__main__":
    place, name, *rest = sys.argv[1:]
    if not rest:
        write(Path(place), name, None, 4)
    elif rest != ["stored"]:
        write(Path(place), name, int(rest[0]), 6)
    else:
        print("\n" + json.dumps(READ[name](Path(place))))
