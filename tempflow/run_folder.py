"""The folder of a run: opened only when nothing of an earlier run can be lost; and checks across settings."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import yaml

from tempflow.config import Config, to_yaml, validate
from tempflow.distributed import Ranks
from tempflow.errors import BadInput
from tempflow.paths import write_atomically

MAY_CHANGE = {"run.resume", "run.dir", "run.save_every", "run.keep_checkpoints", "run.trackers", "run.plan_only",
              "run.device", "learn.iterations", "eval.every", "branch.rows", "branch.decode_rows"}  # fmt: skip
"""Settings that may differ when a run is resumed: none of them changes what the run learns from."""


def check_consistency(config: Config, ranks: int) -> None:
    """Arithmetic across settings.

    Raises:
        BadInput: siblings that cannot be compared, or batches that would be cut unevenly.
    """
    branch, learn = config.branch, config.learn
    if branch.siblings < 2 and learn.group == "seed":
        mend = "a seed group compares siblings, so it needs at least 2; or use learn.group=prompt"
        raise BadInput("branch.siblings", branch.siblings, mend)
    if branch.prompts % ranks:
        raise BadInput("branch.prompts", branch.prompts, f"must be a multiple of the {ranks} processes")
    trunks = branch.prompts * branch.seeds // ranks
    if trunks % learn.rows:
        mend = f"must divide the {trunks} trunks of a process (prompts x seeds / processes), or a batch would be cut"
        raise BadInput("learn.rows", learn.rows, mend)
    if (trunks // learn.rows) % learn.updates:
        mend = f"must divide the {trunks // learn.rows} batches of a step (trunks / learn.rows): an update takes whole forks with all their siblings"  # fmt: skip
        raise BadInput("learn.updates", learn.updates, mend)


def open_folder(config: Config, ranks: Ranks) -> Path:
    """Makes the folder of a new run and writes its config.yaml, or checks that of the run to resume.

    Raises:
        BadInput: a run is there already, there is none to resume, its settings differ, or the folder is not writable.
    """
    folder = Path(config.run.dir).expanduser()
    if not ranks.first:
        ranks.wait()
        return folder
    saved = folder / "config.yaml"
    if config.run.resume:
        _check_same_run(config, saved)
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        mend = "exists already; continue it with run.resume=true or choose another run.dir"
        raise BadInput("run.dir", config.run.dir, mend)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(saved, to_yaml(config).encode())
    except OSError as error:
        raise BadInput("run.dir", config.run.dir, f"cannot be written ({error.strerror}); choose another folder") from error
    ranks.wait()
    return folder


def _check_same_run(config: Config, saved: Path) -> None:
    if not saved.is_file():
        raise BadInput("run.resume", "true", f"there is no run in {config.run.dir} (no config.yaml)")
    before = asdict(validate(yaml.safe_load(saved.read_text(encoding="utf-8"))))
    for section, values in asdict(config).items():
        for field, value in values.items():
            name = f"{section}.{field}"
            if name not in MAY_CHANGE and value != before[section][field]:
                mend = f"the run in {config.run.dir} was started with {before[section][field]}; a resumed run keeps it"
                raise BadInput(name, value, mend)
