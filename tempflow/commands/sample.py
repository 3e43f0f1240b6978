"""Makes pictures of prompts:

    tempflow sample digits "two threes"                            the shipped pipeline, before any training
    tempflow sample runs/digits "two threes" "a one above a two"   a run before and after, side by side
    tempflow sample runs/digits --prompts my.txt --noises 2 --checkpoint 10,20,best
    tempflow sample flux1_dev model.lora=my.safetensors "a red cube on a blue sphere"

The first word is the folder of a run, or presets and files joined by commas (digits,my.yaml). Words of the form
section.field=value are settings laid on top, such as eval.steps=28, sample.guidance=4.5 or run.device=cpu; all other
words are prompts. (A prompt that looks like a setting or is called as a preset goes into a file: --prompts.)

Writes grid.png, a file per picture, and pictures.json, which tells what made each of them. The same prompts in the same
order with the same seed have the same noises, whatever else is asked for. Pictures are made as evaluations of a run
make them: by eval.steps steps of the ODE, in plain network calls, without the tails' shortcuts.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from tempflow.commands.ending import Parser, end
from tempflow.commands.trained_options import add_options, check_stack, read_choice, split_names
from tempflow.common.errors import BadInput, Halted
from tempflow.common.say import say
from tempflow.common.stopping import HALTED
from tempflow.prompts import Prompt, read_prompt, read_prompts
from tempflow.settings.stacks import presets

NOISES = 4
SETTING = re.compile(r"\w+\.\w+=")
"""How a setting begins."""
HINT = "before the prompts give the folder of a run, or presets joined by commas, as in: sample digits 'two threes'"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    own = Parser(prog="tempflow sample", description=__doc__, example="tempflow sample digits 'two threes' --noises 2")
    own.add_argument("source", metavar="RUN|STACK", help="a run's folder, or presets and files joined by commas")
    own.add_argument("words", nargs="*", metavar="PROMPT", help="prompts, and settings: section.field=value")
    own.add_argument("--prompts", metavar="FILE", help="a prompt a line, or JSONL; added to those given")
    own.add_argument("--noises", type=int, default=NOISES, help="pictures of each prompt (default: %(default)s)")
    add_options(own, "samples/NAME")
    return own


def split_prompts(words: Sequence[str]) -> tuple[list[str], list[Prompt]]:
    """Settings, and prompts.

    Raises:
        BadInput: a prompt of nothing, or a word that may be meant otherwise: the name of a preset, or `x=y`.
    """
    settings = [word for word in words if SETTING.match(word)]
    texts = [word for word in words if not SETTING.match(word)]
    for word in texts:
        if word in presets() or word.endswith((".yaml", ".yml")):
            hint = "is a preset or file, which goes before the prompts, joined by commas (digits,flow_grpo)"
            raise BadInput("prompt", word, f"{hint}; a prompt of these letters goes into a file, --prompts")
        if re.fullmatch(r"[^\s=]+=\S*", word):
            raise BadInput("prompt", word, "settings have the form section.field=value; such a prompt goes into a file")
    return settings, [read_prompt(text, "prompt") for text in texts]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code: 0, 2 for wrong input, 75 for a model that gives NaN."""
    return end(lambda: _guarded(sys.argv[1:] if arguments is None else list(arguments)))


def _guarded(arguments: Sequence[str]) -> int:
    given = parser().parse_intermixed_args(arguments)
    try:
        return _run(given)
    except Halted as error:
        say(str(error))
        return HALTED


def _run(given: argparse.Namespace) -> int:
    settings, prompts = split_prompts(given.words)
    if re.search(r"\s", given.source) and not Path(given.source).exists():
        raise BadInput("run", given.source, HINT)
    prompts += read_prompts(given.prompts, "--prompts") if given.prompts is not None else []
    if not prompts:
        raise BadInput("prompt", None, "there is none; give one in quotation marks, or a file by --prompts")
    names = split_names(given.source)
    check_stack(names, settings)
    from tempflow.trained.drawing import draw  # torch and diffusers: wrong words are answered before
    from tempflow.trained.output import output_folder
    from tempflow.trained.source import read_source

    source, choice = read_source(names, settings), read_choice(given)
    folder = output_folder(given.output, Path("samples") / source.name, given.force)
    print(draw(source, choice, prompts, given.noises, given.seed, given.rows, folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())
