"""`pytest -m gpu`, a row per test as it ends."""

from __future__ import annotations

import pytest
from half_hour.measure import Options
from importable import ROOT

FILES = ("tests/kernels/test_kernels_gpu.py", "tests/explore/tails/test_tails_gpu.py")
"""looked into without a GPU, where all of these tests are skipped"""


class Rows:
    """A plugin of pytest that writes what became of each test."""

    def __init__(self, options: Options):
        self.options = options

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            words = " ".join(report.longreprtext.split())[-200:]
            self.options.write(test=report.nodeid, outcome=report.outcome, problem=words)


def run_tests(options: Options) -> None:
    """All tests that need a GPU, from the checkout's root."""
    where = FILES if options.tiny else ("tests",)
    arguments = ["-m", "gpu", "-q", "-p", "no:cacheprovider", f"--rootdir={ROOT}", "-c", str(ROOT / "pyproject.toml")]
    status = pytest.main([*arguments, *(str(ROOT / place) for place in where)], plugins=[Rows(options)])
    if status:
        raise SystemExit(1)
