"""Which setting files come from, and the errors of the libraries that read them, as one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import diffusers
import transformers

from tempflow.common.errors import BadInput


@dataclass(frozen=True)
class Origin:
    """A setting and its value. Example: model.path and the folder given there."""

    field: str
    value: str
    what: str = "the pipeline"

    def refusal(self, hint: str) -> BadInput:
        return BadInput(self.field, self.value, hint)

    @contextmanager
    def one_line(self) -> Iterator[None]:
        """Within this context whatever libraries raise becomes a BadInput, and they print no warnings of their own.

        Whatever: the hub's client has raised errors of three network libraries over its versions.

        Raises:
            BadInput: the first 200 characters of an error of theirs.
        """
        try:
            with _quiet():
                yield
        except BadInput:
            raise
        except Exception as error:
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise self.refusal(f"{self.what} does not load ({reason})") from error


@contextmanager
def _quiet() -> Iterator[None]:
    loggers = (diffusers.utils.logging, transformers.utils.logging)
    levels = [logger.get_verbosity() for logger in loggers]
    for logger in loggers:
        logger.set_verbosity_error()
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.set_verbosity(level)
