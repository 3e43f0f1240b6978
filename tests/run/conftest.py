from pathlib import Path

import pytest
from small_runs import train


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> Path:
    """A run of four iterations with KL and two updates each; copy it before you change it."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert train(folder, "learn.updates=2", "objective.kl=0.01") == 0
    return folder
