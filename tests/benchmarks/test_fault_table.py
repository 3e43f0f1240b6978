"""The table of faults in small: a few kinds, each of which has to hold; and what the table counts as the same run."""

import csv
import json
import sys

import pytest
import torch
from beside import Beside
from faults.results import differences
from faults.table import ROOMS, chosen
from importable import ROOT
from safetensors.torch import save_file

SHORT = ("SIGTERM in an iteration", "a second process on the folder")


def begin():
    command = [sys.executable, ROOT / "benchmarks" / "fault_table.py", "--minutes", "0", "--once", "--jobs", "2",
               "--only", "|".join(SHORT), "--folder", "{folder}"]  # fmt: skip
    return Beside(command)


def test_runs_survive_a_few_faults(begun):
    code, output = begun.wait()
    assert code == 0, output
    with (begun.folder / "faults.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(SHORT) and {row["problems"] for row in rows} == {""}
    assert {row["after"] for row in rows} == {"equal"} and {row["lost"] for row in rows} == {"0"}
    assert all(float(row["seconds"]) <= float(row["bound"]) and row["line"] for row in rows)
    assert (begun.folder / "faults.md").read_text().count("| 1 of 1 |") == len(SHORT)


test_runs_survive_a_few_faults.begin = begin


def finished(folder, weight=1.0, reward=0.5, seconds=1.0):
    """What a finished run leaves, in small."""
    checkpoint = folder / "checkpoints" / "step_000002"
    checkpoint.mkdir(parents=True)
    save_file({"w": torch.tensor([weight, 2.0])}, checkpoint / "parameters.safetensors")
    rows = [{"kind": "iteration", "step": 2, "reward_mean": reward, "seconds": seconds}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.parametrize(("changed", "found"), [({}, []), ({"seconds": 7.0}, []), ({"weight": 1.0 + 2**-23}, ["step_"]),
                                                ({"reward": 0.25}, ["metrics of iteration 2"])])  # fmt: skip
def test_runs_are_the_same_in_every_bit_but_their_times(tmp_path, changed, found):
    seen = differences(finished(tmp_path / "a"), finished(tmp_path / "b", **changed))
    assert len(seen) == len(found) and all(name.startswith(start) for name, start in zip(seen, found, strict=True))


def test_kinds_have_names_of_their_own_and_are_many():
    names = [fault.name for room in ROOMS for fault in room.faults]
    assert len(names) == len(set(names)) and len(names) > 30
    assert len(chosen("|".join(SHORT))) == len(SHORT)
