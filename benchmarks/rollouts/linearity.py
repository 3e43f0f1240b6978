"""How the time of an iteration grows with prompts, noises and siblings:

    python benchmarks/rollouts/linearity.py [--architecture digits] [--rounds 3] [--out FOLDER]

Full iterations of the released algorithm and of ours (exact), each quantity on its own at three sizes, in turn.
Writes `linearity_NAME.jsonl` as it goes, then `linearity_NAME.png` and `.md` with the exponent p of seconds ~ size^p:
1 is linear.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from importable import ROOT  # isort: skip

import torch
from machine.environment import environment
from rollouts.architectures import ARCHITECTURES
from rollouts.bench import Bench, iterate, warm_up
from rollouts.variants import EXACT_END, VARIANTS

BASE = {"prompts": 2, "noises": 2, "siblings": 6}
SIZES = {"prompts": (1, 2, 4), "noises": (1, 2, 4), "siblings": (3, 6, 12)}
CHUNKS = {"tails.rows": 24, "reward.rows": 24, "learn.rows": 2, "tails.level": "eager"}
"""small enough that every size but the smallest fills them; eager, since what is measured is growth"""


def points(sizes: dict[str, tuple[int, ...]]) -> list[tuple[str, int]]:
    return [(quantity, size) for quantity, choices in sizes.items() for size in choices]


def measure(bench: Bench, rounds: int, sizes: dict[str, tuple[int, ...]], file: Path) -> list[dict[str, Any]]:
    """Rows of every point, variant and round."""
    variants = [variant for variant in VARIANTS if variant.name in ("official", EXACT_END)]
    common, cases, rows = bench.overrides, {}, []
    with bench.texts(), file.open("w", encoding="utf-8") as out:
        for quantity, size in points(sizes):
            values = {f"explore.{name}": value for name, value in (BASE | {quantity: size}).items()}
            bench.overrides = CHUNKS | common | values
            for variant in variants:
                cases[quantity, size, variant.name] = bench.case(variant)
        for case in cases.values():
            warm_up(case)
        for number in range(rounds):
            for (quantity, size, name), case in cases.items():
                row = {"variant": label(name), "quantity": quantity, "size": size, "round": number,
                       "rollouts": case.rollouts,
                       "seconds": round(iterate(case, number).seconds, 4)}  # fmt: skip
                rows.append(row | {"architecture": bench.name} | environment(bench.device))
                out.write(json.dumps(rows[-1]) + "\n")
                out.flush()
    return rows


def label(name: str) -> str:
    return "ours, exact" if name == EXACT_END else name


def curves(rows: list[dict[str, Any]]) -> dict[tuple[str, str], list[tuple[int, float]]]:
    """(variant, quantity) -> (size, median seconds)."""
    found: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for variant, quantity in dict.fromkeys((row["variant"], row["quantity"]) for row in rows):
        own = [row for row in rows if (row["variant"], row["quantity"]) == (variant, quantity)]
        sizes = sorted({row["size"] for row in own})
        found[variant, quantity] = [
            (size, median(row["seconds"] for row in own if row["size"] == size)) for size in sizes
        ]
    return found


def exponent(curve: list[tuple[int, float]]) -> float:
    """The slope of log seconds over log size, by least squares."""
    across, up = ([math.log(values[column]) for values in curve] for column in (0, 1))
    centre, height = sum(across) / len(across), sum(up) / len(up)
    covariance = sum((x - centre) * (y - height) for x, y in zip(across, up, strict=True))
    return covariance / sum((x - centre) ** 2 for x in across)


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| variant | quantity | seconds at each size | exponent |", "| --- | --- | --- | --- |"]
    for (variant, quantity), curve in curves(rows).items():
        times = ", ".join(f"{size}: {seconds:.2f}" for size, seconds in curve)
        lines.append(f"| {variant} | {quantity} | {times} | {exponent(curve):.2f} |")
    first = rows[0]
    base = ", ".join(f"{value} {name}" for name, value in BASE.items())
    return "\n".join([f"{first['architecture']} on {first['device']}, {first['date']}; where not varied: {base}.", "",
                      *lines])  # fmt: skip


def picture(rows: list[dict[str, Any]], file: Path) -> None:
    """A panel per quantity; dotted lines are proportional to size."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = curves(rows)
    quantities = list(dict.fromkeys(quantity for _, quantity in found))
    figure, axes = plt.subplots(1, len(quantities), figsize=(3.2 * len(quantities), 3.0), sharey=True, squeeze=False)
    colours = dict(zip(dict.fromkeys(variant for variant, _ in found), ("#6b6b6b", "#1f8a70"), strict=False))
    for axis, quantity in zip(axes[0], quantities, strict=True):
        for variant, colour in colours.items():
            sizes, seconds = zip(*found[variant, quantity], strict=True)
            power = exponent(found[variant, quantity])
            axis.plot(sizes, seconds, "o-", color=colour, label=f"{variant}: size^{power:.2f}")
            axis.plot(sizes, [seconds[-1] * size / sizes[-1] for size in sizes], ":", color=colour, linewidth=1)
        axis.set(xlabel=quantity, xlim=(0, None), ylim=(0, None), xticks=sizes)
        axis.legend(fontsize=7.5, frameon=False, loc="upper left")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel("seconds per iteration")
    figure.suptitle(f"{rows[0]['architecture']}, {rows[0]['device']}, {rows[0]['date']}", fontsize=9)
    figure.tight_layout()
    figure.savefig(file, dpi=130)
    plt.close(figure)


def main(
    arguments: list[str] | None = None,
    sizes: dict[str, tuple[int, ...]] = SIZES,
    overrides: dict[str, Any] | None = None,
) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", choices=["digits", *ARCHITECTURES], default="digits")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "cpu")
    asked = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    asked.out.mkdir(parents=True, exist_ok=True)
    file = asked.out / f"linearity_{asked.architecture}.jsonl"
    with tempfile.TemporaryDirectory(prefix="linearity-") as workshop:
        rows = measure(Bench(asked.architecture, device, Path(workshop), overrides or {}), asked.rounds, sizes, file)
    file.with_suffix(".md").write_text(table(rows) + "\n", encoding="utf-8")
    picture(rows, file.with_suffix(".png"))
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
