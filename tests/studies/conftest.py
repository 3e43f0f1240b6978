import sys

import pytest
from small_studies import SCRIPT

from tempflow.studies.compare import jobs as jobs_module


@pytest.fixture
def made(monkeypatch, tmp_path):
    """The runs that were made since the last call, by stand-ins that are over at once."""
    log = tmp_path / "made"
    monkeypatch.setattr(
        jobs_module.Job, "command", lambda job: [sys.executable, "-c", SCRIPT, str(job.folder), str(log)]
    )

    def read() -> set[str]:
        lines = log.read_text().splitlines() if log.is_file() else []
        log.unlink(missing_ok=True)
        return set(lines)

    return read
