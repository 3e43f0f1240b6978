"""report.png: the curves of a run, its process reward against the noise weight, and the same prompts before and after.

`tempflow report runs/digits` draws it again from a run's folder.
"""

from __future__ import annotations

import textwrap
from collections.abc import Container
from io import BytesIO
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from PIL import Image
from torch import Tensor

from tempflow.common.errors import BadInput
from tempflow.common.files import write_atomically
from tempflow.records.rows import read_metrics
from tempflow.records.shape import check_drawable

matplotlib.use("Agg")
from matplotlib import pyplot

matplotlib.rcParams["text.parse_math"] = False  # a dollar sign of a prompt is one
REWARD, WEIGHT, WARNING = "#4269d0", "#6b7280", "#b91c1c"
GOLDS = ("#d97706", "#15803d", "#9333ea", "#be185d")


def save_pictures(folder: Path, step: int, pictures: Tensor) -> None:
    """(n, 3, H, W) uint8 pictures of an evaluation as one strip, `pictures/step_N.png`."""
    folder = folder / "pictures"
    folder.mkdir(exist_ok=True)
    strip = np.concatenate(list(pictures.permute(0, 2, 3, 1).numpy()), axis=1)
    buffer = BytesIO()
    Image.fromarray(strip).save(buffer, format="PNG")
    write_atomically(folder / f"step_{step:06d}.png", buffer.getvalue())


def draw_report(folder: Path) -> Path:
    """Writes `folder/report.png` from its metrics.jsonl and pictures.

    Raises:
        BadInput: rows or pictures that are not those of a run, or a folder that cannot be written.
    """
    rows = read_metrics(folder / "metrics.jsonl")
    if not rows:
        raise BadInput("run.dir", folder, "holds no metrics.jsonl with a line in it; give the folder of a run")
    check_drawable(rows, folder / "metrics.jsonl")
    evaluated = {row["step"] for row in rows if "scores_missing" in row}
    strips = _strips(folder / "pictures", evaluated, max(1, len(rows[0].get("picture_prompts", []))))
    figure = pyplot.figure(figsize=(13, 8.6), constrained_layout=True)
    top, bottom = figure.subfigures(2, 1, height_ratios=(1.0, 0.95))
    by_step, by_time, by_fork = top.subplots(1, 3)
    _curves(by_step, rows, "step", 1.0, "iteration")
    _curves(by_time, rows, "seconds", 1.0, "seconds")
    _spread(by_fork, rows)
    if strips:
        _before_and_after(bottom, strips, rows[0].get("picture_prompts", []))
    buffer = BytesIO()
    figure.savefig(buffer, dpi=110)
    pyplot.close(figure)
    try:
        write_atomically(folder / "report.png", buffer.getvalue())
    except OSError as error:
        raise BadInput("run.dir", folder, f"report.png cannot be written ({error.strerror})") from error
    return folder / "report.png"


def _strips(folder: Path, steps: Container[int], count: int) -> list[tuple[int, np.ndarray]]:
    """The first and the last strip of `count` pictures, each with its iteration.

    Only of these steps: a run that goes on from a checkpoint has pictures of iterations that are yet to come.
    """
    named = [(int(path.stem[5:]), path) for path in folder.glob("step_*.png") if path.stem[5:].isdecimal()]
    found = [(step, path) for step, path in named if step in steps]
    chosen = [min(found), max(found)] if len(found) > 1 else found
    return [(step, _strip(path, count)) for step, path in chosen]


def _strip(path: Path, count: int) -> np.ndarray:
    """Levels (height, width, 3) of a strip.

    Raises:
        BadInput: no picture, or none that can be cut into `count` of them.
    """
    if not path.is_file():
        raise BadInput("pictures", path, "is no file")
    try:
        with Image.open(path) as image:
            strip = np.asarray(image.convert("RGB"))
    except Exception as error:  # whatever Pillow's many readers say of foreign bytes
        raise BadInput("pictures", path, f"not readable as a picture ({error})") from error
    if strip.shape[1] % count:
        raise BadInput("pictures", path, f"{strip.shape[1]} pixels wide, which is not a strip of {count} pictures")
    return strip


def _curves(axes: Any, rows: list[dict], key: str, unit: float, label: str) -> None:
    """Training reward, held-out rewards and gold scores over iterations or seconds; dotted where gold fell alone."""
    trained = [row for row in rows if row.get("reward_mean") is not None]
    axes.plot([row[key] / unit for row in trained], [row["reward_mean"] for row in trained], color=REWARD, lw=1,
              alpha=0.6, label="reward (training branches)")  # fmt: skip
    golds = sorted({name for row in rows for name in row if name.startswith("gold") and name != "gold_fall"})
    lines = [("reward_test", REWARD, "reward"), *zip(golds, cycle(GOLDS), golds, strict=False)]
    for name, color, words in lines:
        seen = [row for row in rows if row.get(name) is not None]
        axes.plot([row[key] / unit for row in seen], [row[name] for row in seen], "o-", ms=3, color=color,
                  label=f"{words} (held-out)")  # fmt: skip
    for row in rows:
        if "gold_fall" in row:
            axes.axvline(row[key] / unit, color=WARNING, ls=":", lw=1)
    axes.set_xlabel(label)
    axes.set_title(f"reward and gold over {'iterations' if key == 'step' else 'time'}")
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8)


def _spread(axes: Any, rows: list[dict]) -> None:
    """Standard deviation among siblings per fork step, early and late in the run, beside the weight of the loss."""
    measured = [row["reward_std_per_step"] for row in rows if "reward_std_per_step" in row]
    weights = rows[0].get("loss_weights", [])
    axes.set_xlabel("fork step")
    axes.set_title("reward std among siblings, weight of the loss")
    table = np.array(measured, dtype=float)
    if np.isnan(table).all():  # also where there is none
        axes.text(0.5, 0.5, "one sibling a fork: nothing to compare", ha="center", transform=axes.transAxes)
        return
    third = max(1, len(table) // 3)
    steps = np.arange(table.shape[1])
    for part, alpha, words in ((table[:third], 1.0, "first third"), (table[-third:], 0.45, "last third")):
        counts = np.maximum((~np.isnan(part)).sum(0), 1)
        axes.bar(steps + (0.2 if alpha < 1 else -0.2), np.nansum(part, 0) / counts, 0.4, color=REWARD, alpha=alpha,
                 label=f"reward std, {words}")  # fmt: skip
    axes.set_xticks(steps)
    twin = axes.twinx()
    weighted = [(step, weight) for step, weight in enumerate(weights) if weight]
    twin.plot(*zip(*weighted, strict=True), "s--", color=WEIGHT, ms=4, label="weight of the policy loss")
    twin.set_ylim(bottom=0)
    handles = [part.get_legend_handles_labels() for part in (axes, twin)]
    axes.legend(handles[0][0] + handles[1][0], handles[0][1] + handles[1][1], fontsize=8)


def _before_and_after(figure: Any, strips: list[tuple[int, np.ndarray]], prompts: list[str]) -> None:
    """The first and the last strip of pictures under their prompts."""
    rows = [(strips[0], "before")] + ([(strips[-1], "after")] if len(strips) > 1 else [])
    count = max(1, len(prompts))
    grid = figure.subplots(len(rows), count, squeeze=False)
    figure.suptitle("the same held-out prompts and initial noises")
    for line, ((step, strip), word) in zip(grid, rows, strict=True):
        pieces = np.split(strip, count, axis=1)
        label = f"{word}\n(iteration {step})"
        line[0].set_ylabel(label)
        for axes, piece in zip(line, pieces, strict=True):
            axes.imshow(piece, interpolation="nearest")
            axes.set_xticks([])
            axes.set_yticks([])
    for axes, prompt in zip(grid[0], prompts, strict=False):
        axes.set_title("\n".join(textwrap.wrap(prompt, 20)), fontsize=8)
