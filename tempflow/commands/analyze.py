"""Measures what a reward can tell apart at each step: `tempflow analyze [PRESET ...] [section.field=...]`.

Takes the arguments of training, trains nothing, in one process. Writes a table, numbers, a picture and a recommendation
that can be laid on the same stack.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tempflow.commands.ending import Parser, end
from tempflow.common.errors import BadInput
from tempflow.common.files import check_makeable
from tempflow.settings.fields import Config
from tempflow.settings.reading import is_override, load

LEVELS = (0.5, 1.0, 1.5)
"""Noise levels that are tried, times the stack's own."""
MOST = 10_000
"""Iterations."""


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    example = "tempflow analyze digits --iterations 1 explore.prompts=4"
    parser = Parser(prog="tempflow analyze", description=__doc__, example=example)
    parser.add_argument("stack", nargs="*", metavar="PRESET, FILE.yaml or section.field=value", help="as in training")
    parser.add_argument("--folder", type=Path, help="where it is written (default: analysis/NAME of the stack)")
    parser.add_argument("--iterations", type=int, default=2, help="of explore.prompts prompts (default: %(default)s)")
    return parser.parse_intermixed_args(arguments)


def analyze(config: Config, iterations: int):
    """The analysis of a stack.

    Raises:
        BadInput: settings that cannot work, or a reward without spread.
    """
    from tempflow.run.assembly import set_up
    from tempflow.studies.analyze.advice import advise
    from tempflow.studies.analyze.measure import analysis_config, measure_spread, measure_steps
    from tempflow.studies.analyze.report import Analysis
    from tempflow.train import backward

    with tempfile.TemporaryDirectory() as folder:
        apart = replace(config.run, dir=folder, resume=False, plan_only=False, trackers=[])
        trainer, _, _ = set_up(analysis_config(replace(config, run=apart)))
        steps, spread = measure_steps(trainer, backward, iterations)
        others = {factor: measure_spread(trainer, factor, iterations) for factor in LEVELS if factor != 1.0}
        spreads = [found for _, found in sorted((others | {1.0: spread}).items())]
        advice = advise(trainer.config, trainer.schedule, spreads)
        return Analysis(steps, spreads, advice, trainer.policy.network_rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code: 0, or 2 for wrong input."""
    return end(lambda: _run(_arguments(arguments)))


def _run(given: argparse.Namespace) -> int:
    """Analyses a stack, writes and tells.

    Raises:
        BadInput: settings that cannot work, a reward without spread, or a folder that cannot be written.
    """
    names = [Path(name).stem for name in given.stack if not is_override(name)]
    folder = given.folder or Path("analysis") / ("_".join(names) or "digits")
    if not 1 <= given.iterations <= MOST:
        raise BadInput("--iterations", given.iterations, f"must lie in 1 .. {MOST}")
    check_makeable("--folder", folder)
    analysis = analyze(load(given.stack), given.iterations)
    analysis.write(folder)
    print(analysis.describe())
    print(f"written to {folder}; lay the recommendation on the stack: {folder / 'recommended.yaml'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
