"""The front door: `tempflow COMMAND ...`, or `python -m tempflow COMMAND ...`.

Nothing heavy is imported before a command needs it. Under torchrun: `torchrun -m tempflow train ...`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version

from tempflow.common.errors import BadInput
from tempflow.common.say import show
from tempflow.common.stopping import DONE, WRONG, leave

COMMANDS = {
    "train": "train a model; the same as tempflow/train.py, also under torchrun",
    "sample": "make pictures of prompts, of a run before and after training or of any model",
    "evaluate": "score checkpoints of a run beside the model before training",
    "report": "draw the report of a run again",
    "study": "run methods over several seeds and compare them with intervals",
    "analyze": "measure which steps of a model a reward can tell apart, and what to fork",
    "tails": "tell what fast tails do to the rewards",
    "export": "write what a run has learnt for diffusers, ComfyUI, kohya or the hub",
    "score": "score a folder of pictures",
    "serve": "serve scorers to trainers on other machines",
    "prompts": "write prompts in the manner of GenEval",
    "doctor": "tell what this machine has, and what is missing for which feature",
    "audit": "list the licences of what is installed, and known faults in it",
}
"""Command -> what it does; each is a module of tempflow/commands."""

EXAMPLES = """\
examples:
  tempflow train                              a small model on any machine, in minutes
  tempflow train digits flow_grpo             presets stack; settings follow as section.field=value
  tempflow train --help                       every preset and setting, a sentence each
  torchrun --nproc-per-node=8 -m tempflow train sd35_pickscore
COMMAND --help tells more. python -m tempflow is the same as tempflow."""


def usage() -> str:
    """A line for each command, and examples."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {words}" for name, words in COMMANDS.items()]
    return "\n".join(["usage: tempflow COMMAND ...", "", *lines, "", EXAMPLES])


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command line; returns the exit code: the command's, or 2 for an unknown command."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("--help", "-h", "help"):
        show(usage())
        return DONE
    name, *rest = arguments
    if name == "--version":
        show(f"tempflow {version('tempflow')}")
        return DONE
    if name not in COMMANDS:
        line = BadInput("command", name, f"no such command; choose one of {', '.join(COMMANDS)}")
        print(f"tempflow: {line}", file=sys.stderr)
        return WRONG
    return import_module(f"tempflow.commands.{name}").main(rest)


def program() -> None:
    """The installed command."""
    leave(main())


if __name__ == "__main__":
    program()
