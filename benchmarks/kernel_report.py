"""From measurements to rows, a table and a plot: `python benchmarks/kernel_report.py OUT.json FOLDER`."""

import json
import sys
from pathlib import Path

SIZE = ("shape", "rows", "siblings", "dtype")


def rows_of(report):
    """One dictionary per figure from the JSON file of pytest-benchmark."""
    for entry in report["benchmarks"]:
        stats = entry["stats"]
        timing = {"median_ms": 1e3 * stats["median"], "iqr_ms": 1e3 * stats["iqr"], "rounds": stats["rounds"]}
        yield entry["extra_info"] | timing


def table(rows):
    """Markdown: one line per operator and size, providers side by side."""
    figures = {(row["operator"], *map(row.get, SIZE), row["provider"]): row for row in rows}
    bound = figures.get(("copy", None, None, None, None, "bound"))
    rate = bound["bytes"] / bound["median_ms"] if bound else None
    lines = ["| operator | size | fused ms | eager ms | compiled ms | x eager | x compiled | of copy bandwidth |"]
    lines.append("|" + "---|" * 8)
    for row in rows:
        if row["provider"] == "fused":
            lines.append(_line(row, figures, rate))
    return "\n".join(lines)


def _line(row, figures, rate):
    size = tuple(map(row.get, SIZE))
    others = [figures.get((row["operator"], *size, provider)) for provider in ("eager", "compiled")]
    times = [f"{other['median_ms']:.3f}" if other else "" for other in others]
    factors = [f"{other['median_ms'] / row['median_ms']:.1f}" if other else "" for other in others]
    share = f"{100 * row['bytes'] / row['median_ms'] / rate:.0f} %" if rate else ""
    label = f"{row['shape']} R={row['rows']} K={row['siblings']}"
    cells = (row["operator"], label, f"{row['median_ms']:.3f}", *times, *factors, share)
    return "| " + " | ".join(cells) + " |"


def plot(rows, path):
    """Bars of the time per provider, relative to eager, for every operator and size."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    base = {(row["operator"], *map(row.get, SIZE)): row["median_ms"] for row in rows if row["provider"] == "eager"}
    measured = [row for row in rows if (row["operator"], *map(row.get, SIZE)) in base and row["provider"] != "eager"]
    sizes = sorted({tuple(map(row.get, SIZE)) for row in measured}, key=str)
    figure, axes = plt.subplots(len(sizes), 1, figsize=(8, 2.2 * len(sizes)), sharex=True, squeeze=False)
    for axis, size in zip(axes[:, 0], sizes, strict=True):
        chosen = [row for row in measured if tuple(map(row.get, SIZE)) == size]
        names = [f"{row['operator']} {row['provider']}" for row in chosen]
        speedups = [base[(row["operator"], *size)] / row["median_ms"] for row in chosen]
        axis.barh(names, speedups, color=["C0" if row["provider"] == "fused" else "C7" for row in chosen])
        axis.axvline(1.0, color="k", linewidth=0.8)
        axis.set_title(f"{size[0]}, R={size[1]}, K={size[2]}", fontsize=9)
        axis.tick_params(labelsize=7)
    axes[-1, 0].set_xlabel("speed relative to the eager sequence (1 = equal)")
    figure.suptitle(f"{rows[0]['device']}, torch {rows[0]['torch']}, {rows[0]['date']}", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def write(rows, folder):
    """rows.jsonl, table.md and plot.png."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "table.md").write_text(table(rows) + "\n")
    plot(rows, folder / "plot.png")


if __name__ == "__main__":
    write(list(rows_of(json.loads(Path(sys.argv[1]).read_text()))), Path(sys.argv[2]))
    print((Path(sys.argv[2]) / "table.md").read_text())
