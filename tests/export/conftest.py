from pathlib import Path

import pytest
from small_runs import train


@pytest.fixture(scope="session")
def run(tmp_path_factory) -> Path:
    """A run of four iterations; copy it before you change it."""
    folder = tmp_path_factory.mktemp("export") / "own_run"
    assert train(folder, "run.trackers=[]", "learn.lr=1e-2", "eval.every=4") == 0
    return folder


@pytest.fixture(autouse=True)
def away(tmp_path, monkeypatch) -> None:
    """Exports go to a folder of their own."""
    monkeypatch.chdir(tmp_path)
