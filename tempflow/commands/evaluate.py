"""Scores checkpoints of a run beside the model before training, on the same prompts and noises:

    tempflow evaluate digits                                   the shipped pipeline, before any training
    tempflow evaluate runs/digits                              the last checkpoint
    tempflow evaluate runs/digits --checkpoint 10,20,best --weights raw
    tempflow evaluate runs/digits --reward digits --prompts my.jsonl --noises 4
    torchrun --nproc-per-node=2 -m tempflow evaluate runs/digits   shared out: the same table

Prints a table of means with standard errors by prompt, and of paired differences to the model before training with
95 % intervals; by kind where prompts have one. Writes scores.csv (a row per model, prompt, noise and scorer) and
summary.json. Pictures are made as the run's own evaluations make them: by eval.steps steps, in plain network calls.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tempflow.commands.ending import Parser, end
from tempflow.commands.trained_options import add_options, check_stack, read_choice, split_words
from tempflow.common.errors import BadInput, Halted
from tempflow.common.say import is_first, say
from tempflow.common.stopping import HALTED


def parser() -> argparse.ArgumentParser:
    """The command line."""
    own = Parser(prog="tempflow evaluate", description=__doc__, example="tempflow evaluate digits --noises 2")
    own.add_argument(
        "words",
        nargs="+",
        metavar="RUN|STACK",
        help="the folder of a run, or presets and files (see train); then settings laid on top: section.field=value",
    )
    own.add_argument(
        "--reward",
        action="append",
        default=[],
        help="a scorer, as in reward.name; several: repeat it (default: the run's reward and gold)",
    )
    own.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="an option of the scorer of --reward; REWARD.KEY=VALUE for one of several",
    )
    own.add_argument("--prompts", metavar="FILE", help="all of its prompts (default: the run's held-out ones)")
    own.add_argument("--noises", type=int, help="initial noises per prompt (default: eval.noises)")
    add_options(own, "evaluations/NAME")
    return own


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code: 0, 2 for wrong input, 75 for a model that only gives NaN."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    return end(lambda: _guarded(given))


def _guarded(arguments: Sequence[str]) -> int:
    given = parser().parse_intermixed_args(arguments)  # wrong words are answered before torch is imported
    names, overrides = split_words(given.words)
    check_stack(names, overrides)
    from tempflow.parallel import ranks as processes

    try:
        return _run(given, names, overrides)
    except Halted as error:
        say(str(error))
        return HALTED
    finally:
        processes.stop()


def _run(given: argparse.Namespace, names: Sequence[str], overrides: Sequence[str]) -> int:
    from tempflow.rewards.parts.options import read_options
    from tempflow.trained.evaluating import Request, evaluate
    from tempflow.trained.output import output_folder
    from tempflow.trained.source import read_source

    source, rewards = read_source(names, overrides), tuple(dict.fromkeys(given.reward))
    if given.option and not rewards:
        raise BadInput("--option", given.option[0], "is an option of a scorer: name it by --reward, too")
    options = read_options(given.option, rewards) if rewards else {}
    request = Request(read_choice(given), rewards, options, given.prompts, given.noises, given.seed, given.rows)
    folder = output_folder(given.output, Path("evaluations") / source.name, given.force)
    report = evaluate(source, request)
    if is_first():
        report.write(folder)
        print(report.describe())
        print(f"written to {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
