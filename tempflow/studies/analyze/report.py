"""What an analysis leaves: a table, a picture, numbers, and the recommendation as a file for the next stack."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib
import yaml

from tempflow.common.files import write_atomically
from tempflow.studies.analyze.advice import Advice, even_weights
from tempflow.studies.analyze.measure import Spread, StepFigures, correlation, level_words

matplotlib.use("Agg")
from matplotlib import pyplot

REWARD, NOISE, AFTER = "#4269d0", "#6b7280", "#d97706"


@dataclass(frozen=True)
class Analysis:
    """All that was measured and follows from it."""

    steps: list[StepFigures]
    spreads: list[Spread]
    """by noise level, ascending"""
    advice: Advice
    network_rows: int
    """rows that one velocity costs: 2 with classifier-free guidance"""

    @property
    def correlation(self) -> float:
        """Of reward spread and noise, over the steps."""
        return correlation([step.reward_std for step in self.steps], [step.noise for step in self.steps])

    def describe(self) -> str:
        """The table and what it says, as Markdown."""
        head = ("step", "sigma", "noise std", "reward std", "zero spread", "gradient", "x weight", "rows a trunk")
        rows = [(str(s.step), f"{s.sigma:.4f}", f"{s.noise:.3f}", f"{s.reward_std:.4f}", f"{100 * s.zero_spread:.0f} %",
                 f"{s.gradient:.3g}", f"{s.weighted_gradient:.3g}", str(s.rows * self.network_rows))
                for s in self.steps]  # fmt: skip
        lines = ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]
        levels = [f"noise level {level_words(s.level)}: mean reward {s.rewards.nanmean():.4f}, "
                  f"spread {s.stds().mean():.4f}" for s in self.spreads]  # fmt: skip
        found = f"correlation of reward std with noise std over {len(self.steps)} steps: {self.correlation:.3f}"
        return "\n".join([*lines, "", found, *levels, self.advice.describe()])

    def write(self, folder: Path) -> None:
        """analysis.md, analysis.json, analysis.png, recommended.yaml, even_noise.yaml and even_gradients.yaml."""
        folder.mkdir(parents=True, exist_ok=True)
        levels = [{"level": s.level, "reward_mean": s.rewards.nanmean().item(), "reward_std": s.stds().tolist()}
                  for s in self.spreads]  # fmt: skip
        steps = [asdict(step) | {"weighted_gradient": step.weighted_gradient} for step in self.steps]
        values = {"steps": steps, "correlation": self.correlation, "levels": levels,
                  "advice": asdict(self.advice) | {"saving": self.advice.saving}}  # fmt: skip
        write_atomically(folder / "analysis.json", json.dumps(values, indent=1).encode())
        write_atomically(folder / "analysis.md", (self.describe() + "\n").encode())
        write_atomically(folder / "recommended.yaml", self.advice.to_yaml().encode())
        write_atomically(folder / "even_noise.yaml", self.advice.even_yaml().encode())
        weights = yaml.safe_dump({"objective": {"weighting": even_weights([step.gradient for step in self.steps])}})
        head = "# Weights with which every step pulls alike, by the gradients that were measured.\n"
        write_atomically(folder / "even_gradients.yaml", (head + weights).encode())
        write_atomically(folder / "analysis.png", draw(self))


def draw(analysis: Analysis) -> bytes:
    """Spread beside noise by step, one against the other, gradients before and after weighting, levels."""
    figure, (by_step, against, pull, levels) = pyplot.subplots(1, 4, figsize=(16, 3.8), constrained_layout=True)
    steps = [s.step for s in analysis.steps]
    stds, noise = [s.reward_std for s in analysis.steps], [s.noise for s in analysis.steps]
    by_step.bar(steps, stds, color=[REWARD if step in analysis.advice.forks else "#c7d2ef" for step in steps])
    twin = by_step.twinx()
    twin.plot(steps, noise, "s--", color=NOISE, ms=4)
    twin.set_ylim(bottom=0)
    twin.set_ylabel("noise std (squares)")
    _name(by_step, "reward std per fork step (dark: recommended)", "fork step", "reward std among siblings")
    against.plot(noise, stds, "o", color=REWARD)
    for step, x, y in zip(steps, noise, stds, strict=True):
        against.annotate(str(step), (x, y), textcoords="offset points", xytext=(5, 3), fontsize=8)
    _name(against, f"correlation {analysis.correlation:.3f}", "noise std", "reward std")
    _gradients(pull, analysis.steps)
    for spread in analysis.spreads:
        levels.plot(steps, spread.stds().tolist(), "o-", ms=3, label=f"level {level_words(spread.level)}")
    levels.legend(fontsize=8)
    _name(levels, "reward std by noise level", "fork step", "reward std")
    buffer = BytesIO()
    figure.savefig(buffer, dpi=110)
    pyplot.close(figure)
    return buffer.getvalue()


def _gradients(axes: Any, steps: Sequence[StepFigures]) -> None:
    places = [s.step for s in steps]
    axes.plot(places, [s.gradient for s in steps], "o-", ms=4, color=NOISE, label="weight 1")
    axes.plot(places, [s.weighted_gradient for s in steps], "o-", ms=4, color=AFTER, label="weighted")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8)
    _name(axes, "gradient of the policy loss", "fork step", "norm of the mean gradient")


def _name(axes: Any, title: str, x: str, y: str) -> None:
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)
