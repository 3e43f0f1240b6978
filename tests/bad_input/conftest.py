"""What a user gets for wrong input: exit code 2 and one line that names the field. Never a traceback, never a wait."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import pytest

SECONDS = 20.0
"""Of processor time: longer than any refusal takes, shorter than what was refused would."""


@pytest.fixture
def refused(capsys) -> Callable[..., str]:
    """Runs a command line that has to be refused; gives the hint of its line.

    `refused(main, ["learn.lr=fast"], "learn.lr")`; before that line a run may have told its plan, with `after_plan`.
    """

    def run(main: Callable[[Sequence[str]], int], arguments: Sequence[object], field: str, after_plan=False) -> str:
        capsys.readouterr()
        begun = time.process_time()
        code = main([str(argument) for argument in arguments])
        seconds, (out, err) = time.process_time() - begun, capsys.readouterr()
        assert code == 2 and "Traceback" not in err + out and seconds < SECONDS
        said = [line for line in err.splitlines() if line.startswith("tempflow: ")]
        assert said and (after_plan or len(err.splitlines()) == 1), err
        assert said[-1].startswith(f"tempflow: {field}="), said[-1]
        assert len([line for line in said if line.startswith(f"tempflow: {field}=")]) == 1 and len(said[-1]) < 2000
        return said[-1].partition(": ")[2]

    return run
