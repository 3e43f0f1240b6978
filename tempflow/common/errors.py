"""The two ways a run ends early, each one line: the user has to change something, or the run stopped on its way."""

from __future__ import annotations


class OneLine(Exception):
    """A field, the value found, and a hint at what to do, as one line."""

    def __init__(self, field: str, value: object, hint: str):
        super().__init__(f"{field}={value}: {hint}")
        self.field, self.value, self.hint = field, value, hint


class BadInput(OneLine, ValueError):
    """Input that the user has to change, found before anything was learnt from it. Exit code 2."""


class Halted(OneLine):
    """A run that stopped after its loop began. What was learnt until then is saved where that is possible."""
