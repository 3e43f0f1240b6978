"""How every command ends: its exit code, and one line where the user has to change something."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from tempflow.common.errors import BadInput
from tempflow.common.say import leave_pipe, say, show
from tempflow.common.stopping import STOPPED, WRONG

CUT_OFF = 141
"""128 + SIGPIPE: whoever read the output has gone."""


class Parser(argparse.ArgumentParser):
    """A command line whose mistakes are one line, as those of settings are.

    Args:
        example: a line that works, at the end of its help.
    """

    def __init__(self, *, example: str = "", epilog: str | None = None, **options: Any):
        parts = [part for part in (epilog, example and f"example:\n  {example}") if part]
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(epilog="\n\n".join(parts) or None, **options)

    def print_help(self, file: Any = None) -> None:
        """As argparse's, for whoever still reads it."""
        if file is None:
            show(self.format_help().rstrip())
        else:
            super().print_help(file)

    def error(self, message: str) -> NoReturn:
        """Raises BadInput in place of argparse's own ending."""
        found = re.match(r"argument ([^:]+): (.*)", message, re.DOTALL)
        name, hint = (found[1], found[2]) if found else ("arguments", message)
        value = re.search(r"'(.*?)'", hint) or re.search(r": (.*)", hint)
        raise BadInput(name, value[1] if value else "", f"{hint}; --help tells more")


def end(work: Callable[[], int], interrupted: str = "interrupted") -> int:
    """The exit code of `work`, or 2 after one line about wrong input or files, 130 after Ctrl-C."""
    try:
        code = work()
        sys.stdout.flush()
        return code
    except BadInput as error:  # which every process meets, if there are several
        say(str(error))
        return WRONG
    except BrokenPipeError:
        leave_pipe()
        return CUT_OFF
    except OSError as error:
        line = BadInput("file", error.filename, f"cannot be used ({error.strerror or error})")
        print(f"tempflow: {line}", file=sys.stderr)
        return WRONG
    except KeyboardInterrupt:
        print(f"tempflow: {interrupted}", file=sys.stderr)
        return STOPPED
