"""Trains: the same as tempflow/train.py, as `tempflow train`, `torchrun -m tempflow train` or `tempflow-train`."""

from __future__ import annotations

from collections.abc import Sequence

from tempflow.common.stopping import leave
from tempflow.run.entrance import enter


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command line; help and wrong settings are answered before anything heavy is imported."""
    return enter(arguments)


def program() -> None:
    """The installed command."""
    leave(main())


if __name__ == "__main__":
    program()
