from pathlib import Path

import pytest
from small_runs import train


@pytest.fixture(scope="session")
def run(tmp_path_factory) -> Path:
    """A run of four iterations with checkpoints after 2 and 4; copy it before you change it."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    assert train(folder, "eval.noises=2", "run.trackers=[]", "learn.lr=1e-2") == 0
    return folder


@pytest.fixture(scope="session")
def full_run(tmp_path_factory) -> Path:
    """A run of one iteration that trains all parameters."""
    folder = tmp_path_factory.mktemp("trained") / "full"
    assert train(folder, "model.train=full", "learn.iterations=1", "eval.prompts=2", "run.trackers=[]") == 0
    return folder
