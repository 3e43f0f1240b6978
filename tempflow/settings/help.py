"""What `--help` prints. Imports nothing heavy: help answers at once."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from tempflow.common.errors import BadInput
from tempflow.common.say import say, show
from tempflow.settings.fields import Config
from tempflow.settings.names import described
from tempflow.settings.reading import load, plain
from tempflow.settings.stacks import KINDS, names_of, presets

USAGE = """\
usage: tempflow train [PRESET or FILE.yaml ...] [section.field=value ...]
Presets and files are laid on one another from left to right: `flux1_dev g2rpo hpsv3`. Without any the
run is digits_even; methods alone lie on digits. `torchrun tempflow/train.py` and `torchrun -m tempflow train` take the
same arguments.

examples:
  tempflow train                                         the preset digits_even, on any machine, in minutes
  tempflow train digits run.plan_only=true               what a run will cost, before it starts
  tempflow train digits flow_grpo learn.iterations=20    presets and files stack, then settings
  tempflow train run.resume=true learn.iterations=90     go on with a run
  torchrun --nproc-per-node=8 -m tempflow train sd35_pickscore run.save_every=10"""


def help_text() -> str:
    """Every preset with its sentence, every field with its default and its sentence."""
    lines = [USAGE]
    for kind in KINDS:
        lines.append(f"\n{kind}")
        lines += [f"  {name}\n      {sentence(presets()[name])}" for name in names_of(kind)]
    for section, settings in groupby(described(Config()).items(), lambda item: item[0].partition(".")[0]):
        lines.append(f"\n{section}")
        for name, (value, info) in settings:
            default = plain(value)
            lines.append(f"  {name}={'null' if default is None else default}\n      {info.description}")
    return "\n".join(lines)


def sentence(path: Path) -> str:
    """The first sentence of the comment at the top of a preset."""
    comment = re.match(r"(#.*\n)*", path.read_text(encoding="utf-8"))
    words = " ".join(line.removeprefix("#").strip() for line in comment[0].splitlines()) if comment else ""
    return re.split(r"(?<=\.)\s", words, maxsplit=1)[0]


def read_command_line(arguments: Sequence[str]) -> Config | int:
    """The settings of a command line; or an exit code, after help (0) or one line about wrong settings (2)."""
    if "--help" in arguments or "-h" in arguments:
        show(help_text())
        return 0
    try:
        return load(arguments)
    except BadInput as error:
        say(str(error))
        return 2
