"""What the operators should take on a GPU, from counted instructions and moved bytes: a model, not a measurement.

    python benchmarks/operators/predictions.py [ROWS.jsonl]    the table, with what was measured beside it
    python benchmarks/operators/predictions.py --count         counts again (needs triton, no GPU): slots.json
    python benchmarks/operators/predictions.py --readme        writes the table into kernels/README.md

Time is the largest of the bounds: bytes over the copy bandwidth, instructions over the issue rate, and the work of two
slow units, each divided by the share of it that is assumed to be reached. Launches are left out: all is for large
inputs, in bf16.
"""

import json
import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SLOTS, README = Path(__file__).with_name("slots.json"), ROOT / "kernels" / "README.md"
MARKS = ("<!-- predictions -->\n", "<!-- end of predictions -->")


@dataclass(frozen=True)
class Chip:
    """Assumptions about a GPU."""

    processors: int
    gigahertz: float
    copy: float
    """TB/s of a large copy, reads and writes together."""


CHIPS = {"H100": Chip(132, 1.755, 3.0), "H200": Chip(132, 1.755, 4.3)}
MEMORY_SHARE, ISSUE_SHARE = 0.93, 0.72
"""Shares of the copy bandwidth and of the issue slots that a kernel is assumed to reach; the second is uncertain."""
LANES = {"issue": 128, "special functions": 16, "wide products": 32}
"""Instructions of a thread that one multiprocessor starts in a clock."""
ELEMENTS = 2**25
"""Row elements of 64 MiB of bf16 latents."""
SIBLINGS = (1, 6, 24)
DRAWN, STORED = ("exact", "fast"), ("exact", "fast", "stored")


@dataclass(frozen=True)
class Operator:
    """Kernels of an operator; bytes per row element in bf16, and per sibling; noise modes; where it is measured."""

    kernels: tuple[str, ...]
    row_bytes: int
    sibling_bytes: int = 0
    noises: tuple[str, ...] = ("none",)
    stored_bytes: int = 0
    measured: tuple[str, str] | None = None


OPERATORS = {
    "step": Operator(("step",), 4, 4, DRAWN, measured=("step", "forward")),
    "guided step": Operator(("guided_step",), 6, 4, DRAWN, measured=("guided_step", "forward")),
    "ODE step": Operator(("ode_step",), 4, 4),
    "log_prob": Operator(("log_prob",), 4, 4, measured=("log_prob", "forward")),
    "log_prob gradient": Operator(("log_prob_gradient",), 6, 4, measured=("log_prob", "backward")),
    "loss forward": Operator(("moments",), 4, 0, STORED, 4, ("loss", "forward")),
    "loss gradient": Operator(("velocity_gradient",), 6, 0, STORED, 4, ("loss", "backward")),
    "loss + gradient": Operator(("moments", "velocity_gradient"), 10, 0, STORED, 8, ("loss", "full")),
    "normal": Operator(("normal",), 0, 4, DRAWN, measured=("normal", "forward")),
}


@dataclass(frozen=True)
class Prediction:
    """Time per row element, what bounds it, and the share of the copy bandwidth that this is."""

    picoseconds: float
    bound: str
    copy_share: float


def predict(operator: str, siblings: int, chip: str, noise: str = "fast") -> Prediction:
    """Of an operator of OPERATORS for K siblings on a chip of CHIPS; `noise` is ignored where none is used.

    Raises:
        KeyError: an unknown operator, chip or noise mode.
    """
    spec, limits = OPERATORS[operator], CHIPS[chip]
    noise = noise if len(spec.noises) > 1 else "none"
    counts = json.loads(SLOTS.read_text())["kernels"]
    bounds = dict.fromkeys(LANES, 0.0)
    for kernel in spec.kernels:
        for name, number in _numbers(counts[f"{kernel} {noise}"], siblings).items():
            bounds[name] += 1e3 * number / (limits.processors * limits.gigahertz * LANES[name] * ISSUE_SHARE)
    size = spec.row_bytes + siblings * (spec.sibling_bytes + (spec.stored_bytes if noise == "stored" else 0))
    bounds["memory"] = size / limits.copy / MEMORY_SHARE
    bound = max(bounds, key=bounds.get)
    return Prediction(bounds[bound], bound, size / limits.copy / bounds[bound])


def _numbers(count: dict, siblings: int) -> dict:
    """Instructions per row element by unit."""
    issue = count["outside"] + siblings * count["loop"]
    return {"issue": issue, "special functions": siblings * count["special"], "wide products": siblings * count["wide"]}


def table(measured: Path | None = None) -> str:
    """Markdown: assumptions, then a line per operator, K and noise with both chips side by side."""
    rows = [json.loads(line) for line in measured.read_text().splitlines()] if measured else []
    chips = ", ".join(f"{n}: {c.processors} SMs at {c.gigahertz} GHz, copy {c.copy} TB/s" for n, c in CHIPS.items())
    about = json.loads(SLOTS.read_text())
    lines = [
        f"Predicted, not measured: from SASS of triton {about['triton']} for {about['target']} and these assumptions:",
        f"{chips}; {MEMORY_SHARE:.0%} of the copy bandwidth and {ISSUE_SHARE:.0%} of the issue slots are reached",
        "(the second uncertain by a fifth). Per row element in bf16; us at 64 MiB of latents, without launches; the",
        "share is of the copy bandwidth; measured ps where rows of `half_hour/operator_times.py` were given.",
        "",
        _line(
            ["operator", "noise", "K", *(f"{n} {c}" for n in CHIPS for c in ("ps", "us", "bound", "share", "measured"))]
        ),
        "|" + "---|" * (3 + 5 * len(CHIPS)),
    ]
    for operator, spec in OPERATORS.items():
        lines += [
            _line([operator, noise, siblings, *(c for n in CHIPS for c in _cells(rows, operator, siblings, n, noise))])
            for noise in spec.noises for siblings in SIBLINGS
        ]  # fmt: skip
    return "\n".join(lines) + "\n"


def _line(cells) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def _cells(rows, operator: str, siblings: int, chip: str, noise: str) -> list[str]:
    found = predict(operator, siblings, chip, noise)
    microseconds = 1e-6 * found.picoseconds * ELEMENTS
    share = f"{100 * found.copy_share:.0f} %"
    return [
        f"{found.picoseconds:.1f}",
        f"{microseconds:.0f}",
        found.bound,
        share,
        _measured(rows, operator, siblings, chip, noise),
    ]


def _measured(rows, operator: str, siblings: int, chip: str, noise: str) -> str:
    """Picoseconds per row element of the largest size that was measured, inside a graph if there is such a figure."""
    place = OPERATORS[operator].measured
    fitting = [
        row for row in rows
        if (row["operator"], row.get("mode")) == place and row["provider"] == "fused" and row["siblings"] == siblings
        and chip in row["device"] and row["dtype"] == "torch.bfloat16" and noise in ("none", row.get("noise", "fast"))
    ]  # fmt: skip
    if not fitting:
        return ""
    row = max(fitting, key=_elements)
    return f"{1e9 * (row.get('graph_ms') or row['median_ms']) / _elements(row):.1f}"


def _elements(row) -> int:
    from operators.callables import SHAPES

    return row["rows"] * math.prod(SHAPES[row["shape"]])


VARIANTS = {
    "step": ("step", {"GUIDANCE": None}), "guided_step": ("step", {}), "normal": ("normal", {}),
    "log_prob": ("log_prob", {}), "log_prob_gradient": ("log_prob_gradient", {}),
    "moments": ("moments", {"REFERENCE": False}), "velocity_gradient": ("velocity_gradient", {"KL_COEF": 0.0}),
}  # fmt: skip
"""What is counted: kernel and constants that differ from those of the gate."""
LOADS = {"log_prob_gradient none": 3, "velocity_gradient stored": 3}
"""Loads per sibling of loops that the compiler unrolls: two of numbers, one of the slope."""


def count() -> dict:
    """Instructions per element of every kernel, from code compiled for sm_90."""
    sys.path[:0] = [str(ROOT / "tests" / "support"), str(ROOT / "kernels")]
    import kernel_aot
    import triton

    kernels = {}
    for name, (kernel, changes) in VARIANTS.items():
        loss, drawing = kernel in ("moments", "velocity_gradient"), kernel in kernel_aot.DRAWING
        for noise in STORED if loss else DRAWN if drawing else ("none",):
            own = changes | ({"STORED": noise == "stored"} if loss else {})
            slots = _slots(kernel_aot, kernel, own, noise if noise in DRAWN else "exact")
            key = f"{name} {noise}"
            kernels[key] = _per_element(slots, kernel_aot.NUMBERS, LOADS.get(key), everything=kernel == "normal")
            if name == "step":
                ode = {"loop": slots.shortest / kernel_aot.NUMBERS, "special": 0.0, "wide": 0.0}
                kernels["ode_step none"] = kernels[key] | ode
    return {"triton": triton.__version__, "target": "sm_90", "dtype": "bf16", "kernels": kernels}


def _slots(kernel_aot, kernel: str, changes: dict, noise: str):
    before = kernel_aot.KERNELS[kernel]
    kernel_aot.KERNELS[kernel] = (before[0], before[1] | changes)
    try:
        return kernel_aot.figures(kernel, "sm_90", noise).slots
    finally:
        kernel_aot.KERNELS[kernel] = before


def _per_element(slots, numbers: int, loads: int | None, everything: bool) -> dict:
    """Per element; `everything`: a kernel without a loop does all of its work once for every sibling."""
    turns = numbers * (slots.loads // loads if loads else 1)
    given = {name: value / turns for name, value in asdict(slots).items() if name in ("loop", "special", "wide")}
    outside = slots.outside / numbers
    return given | ({"outside": 0.0, "loop": outside} if everything else {"outside": outside})


def in_readme(text: str) -> str:
    """The README's text with the present table between its marks."""
    before, rest = text.split(MARKS[0])
    return before + MARKS[0] + table() + MARKS[1] + rest.split(MARKS[1])[1]


def main(arguments) -> None:
    if arguments == ["--count"]:
        SLOTS.write_text(json.dumps(count(), indent=1) + "\n")
    elif arguments == ["--readme"]:
        README.write_text(in_readme(README.read_text()))
    else:
        print(table(Path(arguments[0]) if arguments else None), end="")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT / "benchmarks"))
    main(sys.argv[1:])
