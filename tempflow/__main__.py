"""The front door: `python -m tempflow COMMAND ...`. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

from tempflow.common.errors import BadInput
from tempflow.run.entrance import leave

COMMANDS = {
    "train": "train a model; the same as torchrun tempflow/train.py",
    "sample": "make pictures of prompts, of a run before and after training or of any model",
    "evaluate": "score checkpoints of a run beside the model before training",
    "study": "run methods over several seeds and compare them with intervals",
    "analyze": "measure which steps of a model a reward can tell apart, and what to fork",
    "tails": "tell what fast tails do to the rewards",
    "export": "write what a run has learnt for diffusers, ComfyUI, kohya or the hub",
    "report": "draw the report of a run again",
    "score": "score a folder of pictures",
    "serve": "serve scorers to trainers on other machines",
    "prompts": "write prompts in the manner of GenEval",
    "audit": "list the licences of what is installed, and known faults in it",
}
"""Command -> what it does; each is a module of tempflow/commands."""


def usage() -> str:
    """A line for each command."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {words}" for name, words in COMMANDS.items()]
    return "\n".join(["usage: python -m tempflow COMMAND ...", *lines, "COMMAND --help tells more."])


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command line; returns the exit code: the command's, or 2 for an unknown command."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("--help", "-h"):
        print(usage())
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        line = BadInput("command", name, f"no such command; choose one of {', '.join(COMMANDS)}")
        print(f"tempflow: {line}", file=sys.stderr)
        return 2
    return import_module(f"tempflow.commands.{name}").main(rest)


if __name__ == "__main__":
    leave(main())
