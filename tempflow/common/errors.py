"""The one error of wrong input: a field, the value found and how to mend it, in one line."""

from __future__ import annotations


class BadInput(ValueError):
    """Input that the user has to change. `train.py` prints it as one line and exits with code 2."""

    def __init__(self, field: str, value: object, mend: str):
        super().__init__(f"{field}={value}: {mend}")
        self.field, self.value, self.mend = field, value, mend


class Unscored(BadInput):
    """Images that got no reward, from which nothing has been learnt yet: the run is saved before it stops."""
