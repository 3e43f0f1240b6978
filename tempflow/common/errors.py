"""The two ways a run ends early, each one line: the user has to change something, or the run stopped on its way."""

from __future__ import annotations

import reprlib

LONGEST = 300
"""Characters of a value that are shown: the line has to stay one that can be read."""


class OneLine(Exception):
    """A field, the value found, and a hint at what to do, as one line, whatever they hold."""

    def __init__(self, field: str, value: object, hint: str):
        super().__init__(f"{_cut(field, LONGEST)}={shown(value)}: {_cut(hint, 4 * LONGEST)}")
        self.field, self.value, self.hint = field, value, hint


def shown(value: object) -> str:
    """A value on one line, its middle left out where it is long.

    Lists and dictionaries are cut before they are written out: a few that hold one another can be endless in words.
    """
    text = value if isinstance(value, str) else _SHORT.repr(value) if isinstance(value, list | dict) else str(value)
    return _cut(text, LONGEST)


def _cut(text: str, most: int) -> str:
    """The text without its middle where it is long, and without signs that would move a terminal's cursor."""
    if len(text) > most:
        text = f"{text[: most * 2 // 3]}...{text[-most // 3 :]} ({len(text)} characters)"
    text = " ".join(text.split()) if any(sign in text for sign in "\n\r\t\v\f\x85\u2028\u2029") else text
    return "".join(sign if sign.isprintable() else "?" for sign in text)


_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxlist, _SHORT.maxdict, _SHORT.maxstring, _SHORT.maxother = 6, 64, 64, LONGEST, LONGEST


class BadInput(OneLine, ValueError):
    """Input that the user has to change, found before anything was learnt from it. Exit code 2."""


class Halted(OneLine):
    """A run that stopped after its loop began. What was learnt until then is saved where that is possible."""
