"""The secret that a trainer and its scorers' servers share. It is never a setting, lest config.yaml hold it."""

from __future__ import annotations

import os

from tempflow.common.errors import BadInput
from tempflow.common.files import read_text

VARIABLE = "TEMPFLOW_SCORER_TOKEN"


def read_token(setting: str, file: str | None) -> str | None:
    """The first line of `file`, else the environment variable, else None.

    Raises:
        BadInput: the file cannot be read, or the token is not one word of printable ASCII.
    """
    token = os.environ.get(VARIABLE)
    if file is not None:
        token = read_text(setting, file).partition("\n")[0].strip()
    if token is None:
        return None
    if not (token and token.isascii() and token.isprintable() and " " not in token):
        raise BadInput(setting, file or VARIABLE, "the token must be one word of printable ASCII characters")
    return token
