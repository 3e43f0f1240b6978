"""What a command makes of a command line, without doing it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import pytest

from tempflow.__main__ import COMMANDS, main
from tempflow.settings.reading import load


class Understood(Exception):
    """A command has read its command line and would go to work now."""


def understand(arguments: Sequence[str]) -> None:
    """Reads `COMMAND ...` as that command does.

    Raises:
        BadInput, AssertionError: it does not understand it.
    """
    name, *rest = arguments
    assert name in COMMANDS, f"{name} is no command"
    if name == "train":
        load(rest)
        return
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Understood):
        for method in ("parse_args", "parse_intermixed_args"):
            patch.setattr(argparse.ArgumentParser, method, _stop_after(getattr(argparse.ArgumentParser, method)))
        code = main(arguments)
        raise AssertionError(f"tempflow {' '.join(arguments)}: exit code {code}")


def _stop_after(parse_args):
    """argparse's method, which nothing comes after. Of commands that take a stack, that is read, too."""

    def reading(self, arguments=None, namespace=None):
        given = parse_args(self, arguments, namespace)
        if isinstance(getattr(given, "stack", None), list):
            load(given.stack)
        raise Understood

    return reading
