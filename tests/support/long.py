"""Long forms of tests: `pytest -m long` runs what `pytest` leaves out."""

from collections.abc import Iterable

import pytest


def mostly_long(cases: Iterable, every: int) -> list:
    """Parameters of which each `every`-th is always tried, and the others in the long form."""
    return [
        case
        if place % every == 0
        else pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.long)
        for place, case in enumerate(cases)
    ]
