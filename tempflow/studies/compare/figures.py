"""study.png: held-out reward and the study's metric against iterations, network rows and seconds, over seeds."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from itertools import cycle
from typing import Any

import matplotlib
import numpy as np

from tempflow.studies.compare.results import AXES, Contrast, Curve, Point, curve
from tempflow.studies.compare.study import Study

matplotlib.use("Agg")
from matplotlib import pyplot

COLORS = ("#4269d0", "#d97706", "#15803d", "#9333ea", "#be185d", "#0e7490", "#7c2d12", "#4d7c0f", "#6b7280", "#111827")
STYLES = ("-", "--", ":")
REWARD = "reward_test"


def draw_curves(study: Study, points: Sequence[Point], form: str = "png") -> bytes:
    """The picture, as png or svg."""
    scores = list(dict.fromkeys((REWARD, study.metric)))
    figure, table = pyplot.subplots(len(scores), len(AXES), figsize=(14, 3.7 * len(scores)), squeeze=False,
                                    constrained_layout=True)  # fmt: skip
    for line, score in zip(table, scores, strict=True):
        for axes, (axis, words) in zip(line, AXES.items(), strict=True):
            for (run, color), style in zip(styles(study), cycle(s for s in STYLES for _ in COLORS), strict=False):
                _line(axes, curve(points, run, axis, score), color, style, run)
            if score == study.metric and study.target is not None:
                axes.axhline(study.target, color="#9ca3af", lw=0.8, ls="--")
            axes.set_xlabel(words)
            axes.grid(alpha=0.25)
        line[0].set_ylabel(f"{score} (held-out)")
    figure.legend(*table[0][0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    figure.suptitle(f"{study.name}: mean and 95 % interval over seeds")
    return _written(figure, form)


def styles(study: Study) -> list[tuple[str, str]]:
    """(run, color), the same in all figures."""
    return list(zip(study.runs, cycle(COLORS), strict=False))


def _line(axes: Any, found: Curve, color: str, style: str, run: str) -> None:
    mean, half = np.array(found.mean), np.nan_to_num(np.array(found.half))
    axes.plot(found.x, mean, style, marker="o", ms=2.5, lw=1.4, color=color, label=run)
    axes.fill_between(found.x, mean - half, mean + half, color=color, alpha=0.13, lw=0)


def draw_differences(study: Study, contrasts: Sequence[Contrast], form: str = "png") -> bytes | None:
    """The final metric's differences, with their intervals; None where there are none."""
    known = [contrast for contrast in contrasts if contrast.difference is not None]
    if not known:
        return None
    figure, axes = pyplot.subplots(figsize=(9, 0.9 + 0.42 * len(known)), constrained_layout=True)
    colors = dict(styles(study))
    for place, contrast in enumerate(reversed(known)):
        difference, color = contrast.difference, colors[contrast.run]
        half = np.nan_to_num(difference.half)
        axes.errorbar([difference.mean], [place], xerr=[half], fmt="o", color=color, capsize=3)
    axes.set_yticks(range(len(known)), [f"{contrast.run} less {contrast.other}" for contrast in reversed(known)])
    axes.axvline(0, color="#9ca3af", lw=0.8)
    axes.set_xlabel(f"difference of final {study.metric}, pairs of one seed, 95 % intervals")
    axes.grid(alpha=0.25, axis="x")
    axes.margins(y=0.3 / len(known) + 0.1)
    return _written(figure, form)


def _written(figure: Any, form: str) -> bytes:
    buffer = BytesIO()
    figure.savefig(buffer, format=form, dpi=110)
    pyplot.close(figure)
    return buffer.getvalue()
