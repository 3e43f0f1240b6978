"""Studies whose runs are stand-ins that are over at once."""

import shutil

import yaml

from tempflow.__main__ import main as front_door

FILE = {
    "name": "one",
    "base": ["digits", "explore.prompts=2", "explore.noises=1", "learn.rows=2", "run.device=cpu"],
    "runs": {"all": ["tempflow"], "first": ["tempflow", "explore.forks=first:1"]},
    "seeds": [1, 2],
    "budget": {"iterations": 3},
    "target": 0.5,
    "baseline": "all",
}
SCRIPT = """
import json, sys
from pathlib import Path
folder = Path(sys.argv[1])
folder.mkdir(parents=True, exist_ok=True)
row = {"step": 3, "network_rows": 10, "training_seconds": 1.5, "reward_mean": 0.5, "reward_test": 0.5, "gold": 0.25}
first = {"step": 1, "network_rows": 4, "training_seconds": 0.5, "reward_mean": 0.5}
(folder / "metrics.jsonl").write_text(json.dumps(first) + "\\n" + json.dumps(row))
with Path(sys.argv[2]).open("a") as file:
    print(folder.parent.parent.name, folder.parent.name, folder.name, file=file)
"""


def study(tmp_path, *more, **changes) -> int:
    path = tmp_path / "file.yaml"
    path.write_text(yaml.safe_dump(FILE | changes))
    return front_door(["study", str(path), "--folder", str(tmp_path / "studies"), *more])


def forget_runs(tmp_path, name: str) -> None:
    """Leaves what is worth keeping."""
    for place in (tmp_path / "studies" / name).iterdir():
        if place.is_dir():
            shutil.rmtree(place)
