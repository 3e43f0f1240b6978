"""From measurements to rows, a table and a plot.

    python benchmarks/operators/report.py OUT.json FOLDER      rows.jsonl, table.md and plot.png from pytest-benchmark
    python benchmarks/operators/report.py FOLDER               table.md and plot.png again from rows.jsonl
"""

import importlib.util
import json
import math
import sys
from pathlib import Path

SIZE = ("shape", "rows", "siblings", "dtype")
HEADER = (
    "operator", "mode", "size", "fused ms", "eager ms", "compiled ms", "x eager", "x compiled", "bound ms",
    "fused MiB", "eager MiB",
)  # fmt: skip


def rows_of(report):
    """One dictionary per figure from the JSON file of pytest-benchmark."""
    for entry in report["benchmarks"]:
        stats = entry["stats"]
        timing = {"median_ms": 1e3 * stats["median"], "min_ms": 1e3 * stats["min"], "iqr_ms": 1e3 * stats["iqr"]}
        yield entry["extra_info"] | timing | {"rounds": stats["rounds"]}


def least(row):
    """The time that tables show: on CPU the least of the rounds, which other load disturbs least; else the median."""
    return row.get("min_ms", row["median_ms"])


def with_bounds(rows):
    """Rows with `bound_ms`: bytes over the copy bandwidth, or the cost of one operation if that is more."""
    found = {row["operator"]: row for row in rows if row["provider"] == "bound"}
    if not {"copy", "launch"} <= set(found):
        return rows
    rate, floor = found["copy"]["bytes"] / least(found["copy"]), least(found["launch"])
    return [row | {"bound_ms": max(row["bytes"] / rate, floor)} for row in rows]


def place(row):
    """What a figure is about, whoever provides it."""
    return (row["operator"], row.get("mode"), *map(row.get, SIZE))


def label(row):
    return f"{row['shape']} R={row['rows']} K={row['siblings']}"


def table(rows):
    """Markdown: one line per operator, mode and size, providers side by side."""
    figures = {(*place(row), row["provider"]): row for row in rows}
    lines = ["| " + " | ".join(HEADER) + " |", "|" + "---|" * len(HEADER)]
    lines += [_line(row, figures) for row in rows if row["provider"] == "fused"]
    return "\n".join(lines)


def _line(row, figures):
    others = [figures.get((*place(row), provider)) for provider in ("eager", "compiled")]
    times = [f"{least(other):.3f}" if other else "" for other in others]
    factors = [f"{least(other) / least(row):.1f}" if other else "" for other in others]
    bound = f"{row['bound_ms']:.3f}" if "bound_ms" in row else ""
    memory = [_mebibytes(provider) for provider in (row, others[0])]
    cells = (row["operator"], row["mode"], label(row), f"{least(row):.3f}", *times, *factors, bound, *memory)
    return "| " + " | ".join(cells) + " |"


def _mebibytes(row):
    return f"{row['peak_bytes'] / 2**20:.1f}" if row and row.get("peak_bytes") is not None else ""


def plot(rows, path):
    """How many times faster than the eager sequence, and than torch.compile of it: operators down, sizes across."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = {provider: _factors(rows, provider) for provider in ("eager", "compiled")}
    panels = {provider: panel for provider, panel in panels.items() if panel}
    widths = [1 + len({size for _, size in panel}) for panel in panels.values()]
    height = 1.8 + 0.27 * max(len({point for point, _ in panel}) for panel in panels.values())
    figure, axes = plt.subplots(
        1, len(panels), figsize=(2.6 + 0.62 * sum(widths), height), width_ratios=widths, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for axis, (provider, panel) in zip(axes[0], panels.items(), strict=True):
        _panel(axis, panel, f"times faster than {'torch.compile' if provider == 'compiled' else provider}")
    first = rows[0]
    threads = f", threads: {first['threads']} ({first.get('clock', 'wall')} clock)" if first.get("threads") else ""
    figure.suptitle(f"{first['device']}{threads}, torch {first['torch']}, {first['date']}", fontsize=9)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _factors(rows, provider):
    """{(operator and mode, size): speed of the fused operator relative to `provider`}."""
    fused = {place(row): row for row in rows if row["provider"] == "fused"}
    return {
        (f"{row['operator']} {row['mode']}", label(row)): least(row) / least(fused[place(row)])
        for row in rows if row["provider"] == provider and place(row) in fused
    }  # fmt: skip


def _panel(axis, factors, title):
    """One table of numbers on a colour scale: white is equal, green faster, red slower."""
    points, sizes = (list(dict.fromkeys(key[i] for key in factors)) for i in (0, 1))
    scale = [[math.log2(factors.get((point, size), math.nan)) for size in sizes] for point in points]
    axis.imshow(scale, cmap="PiYG", vmin=-4, vmax=4, aspect="auto")
    for (point, size), factor in factors.items():
        text = f"{factor:.1f}" if factor < 99.5 else f"{factor:.0f}"
        color = "white" if abs(math.log2(factor)) > 3 else "black"
        axis.text(sizes.index(size), points.index(point), text, ha="center", va="center", fontsize=7, color=color)
    axis.set_xticks(range(len(sizes)), [size.replace(" ", "\n", 1) for size in sizes], fontsize=6.5, rotation=40)
    axis.set_yticks(range(len(points)), points, fontsize=7)
    axis.set_title(title, fontsize=9)


def report(rows, folder):
    """table.md and, where matplotlib is, plot.png; returns the table."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = with_bounds(rows)
    (folder / "table.md").write_text(table(rows) + "\n")
    if importlib.util.find_spec("matplotlib") is None:
        print("plot.png: not drawn, matplotlib is not installed")
    elif any(row["provider"] == "eager" for row in rows):
        plot(rows, folder / "plot.png")
    return table(rows)


def read(folder):
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]


def write(rows, folder):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    folder = Path(sys.argv[-1])
    if len(sys.argv) == 3:
        write(with_bounds(list(rows_of(json.loads(Path(sys.argv[1]).read_text())))), folder)
    print(report(read(folder), folder))
