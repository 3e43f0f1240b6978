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
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]
SLOTS, README = Path(__file__).with_name("slots.json"), ROOT / "kernels" / "README.md"
MARKS = ("<!-- predictions -->\n", "<!-- end of predictions -->")


@dataclass(frozen=True)
class Chip:
    """Assumptions about a GPU."""

    device: str
    """its name, as torch tells it: others of the family have fewer processors, clocks or slower memory"""
    processors: int
    gigahertz: float
    copy: float
    """TB/s of a large copy, reads and writes together."""


CHIPS = {
    "H100": Chip("NVIDIA H100 80GB HBM3", 132, 1.755, 3.0),
    "H200": Chip("NVIDIA H200", 132, 1.755, 4.3),
}
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
    "ODE step": Operator(("ode_step",), 4, 4, measured=("ode_step", "forward")),
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


def against_stored(siblings: int, chip: str) -> float:
    """How many times as long as our loss with gradient, drawing fast noise, one should take that is compiled and reads
    its noise: it is assumed to move what ours moves that reads noise, at the same share of the copy bandwidth."""
    ours, others = (predict("loss + gradient", siblings, chip, noise) for noise in ("fast", "stored"))
    return others.picoseconds / ours.picoseconds


def chip_of(device: str) -> str | None:
    """The chip of CHIPS of that name, which torch tells."""
    return next((name for name, chip in CHIPS.items() if chip.device == device), None)


def measured_as(operator: str, mode: str) -> str | None:
    """The name among OPERATORS of what the benchmarks measure by that one."""
    return next((name for name, known in OPERATORS.items() if known.measured == (operator, mode)), None)


def drawn(operator: str, mode: str) -> bool:
    """Whether it has noise modes."""
    name = measured_as(operator, mode)
    return name is not None and len(OPERATORS[name].noises) > 1


def _numbers(count: dict, siblings: int) -> dict:
    """Instructions per row element by unit."""
    issue = count["outside"] + siblings * count["loop"]
    return {"issue": issue, "special functions": siblings * count["special"], "wide products": siblings * count["wide"]}


def table(measured: Path | None = None) -> str:
    """Markdown: assumptions, then a line per operator, K and noise with both chips side by side."""
    rows = [json.loads(line) for line in measured.read_text().splitlines()] if measured else []
    chips = ", ".join(f"{n}: {c.processors} SMs at {c.gigahertz} GHz, copy {c.copy} TB/s" for n, c in CHIPS.items())
    about = json.loads(SLOTS.read_text())
    against = ", ".join(f"{against_stored(6, name):.2f}x on an {name}" for name in CHIPS)
    h200 = {siblings: f"{100 * predict('step', siblings, 'H200').copy_share:.0f}" for siblings in SIBLINGS}
    lines = [
        f"Predicted, not measured: from SASS of triton {about['triton']} for {about['target']} and these assumptions:",
        f"{chips};",
        f"{MEMORY_SHARE:.0%} of the copy bandwidth and {ISSUE_SHARE:.0%} of the issue slots are reached, the second",
        "uncertain by a fifth. Per row element in bf16; us at 64 MiB of latents, without launches; the share is of the",
        "copy bandwidth, `assumed` where memory is the bound; measured ps where rows of `half_hour/operator_times.py`",
        "were given. Loss and gradient of a compiled loss that reads stored noise should take, over ours with fast",
        f"noise at K = 6, {against}: by this model the goal of 1.4x is not reached. Nor are",
        f"85 % of the copy on an H200 by the step: {h200[1]} to {h200[24]} % with fast noise.",
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
    share = f"{100 * found.copy_share:.0f} %" + (" assumed" if found.bound == "memory" else "")
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
        and row["device"] == CHIPS[chip].device and row["dtype"] == "torch.bfloat16"
        and noise in ("none", row.get("noise", "fast")) and row["median_ms"]
    ]  # fmt: skip
    if not fitting:
        return ""
    row = max(fitting, key=_elements)
    return f"{1e9 * (row.get('graph_ms') or row['median_ms']) / _elements(row):.1f}"


def _elements(row) -> int:
    from operators.callables import SHAPES

    return row["rows"] * math.prod(SHAPES[row["shape"]])


@dataclass(frozen=True)
class Variant:
    """What is counted: a kernel, the constants that differ from those of the gate, the noise modes, which loop."""

    kernel: str
    changes: dict
    noises: tuple[str, ...] = ("none",)
    loads: int = 0
    """per sibling, of a loop that the compiler unrolls where it draws nothing; 0: it does not"""
    loops: bool = True
    """False: a kernel without a loop does all of its work once for every sibling"""
    shortest: bool = False
    """the shortest way through its loop, on which it neither draws nor sums"""
    compiled: str = "exact"
    """the mode of the compilation for a noise mode that draws nothing"""


VARIANTS = {
    "step": Variant("step", {"GUIDANCE": None}, DRAWN),
    "ode_step": Variant("step", {"GUIDANCE": None}, shortest=True, compiled="fast"),
    "guided_step": Variant("step", {}, DRAWN),
    "normal": Variant("normal", {}, DRAWN, loops=False),
    "log_prob": Variant("log_prob", {}),
    "log_prob_gradient": Variant("log_prob_gradient", {}, loads=3),  # two of numbers, one of the slope
    "moments": Variant("moments", {"REFERENCE": False}, STORED),
    "velocity_gradient": Variant("velocity_gradient", {"KL_COEF": 0.0}, STORED, loads=3),
}
READS = {noise: {"STORED": noise == "stored"} for noise in STORED}
"""Constant of a kernel that can read its noise, by noise mode."""


def count() -> dict:
    """Instructions per element of every kernel, from code compiled for sm_90."""
    sys.path[:0] = [str(ROOT / "tests" / "support"), str(ROOT / "kernels")]
    import kernel_aot
    import triton

    kernels = {
        f"{name} {noise}": _per_element(_slots(kernel_aot, variant, noise), kernel_aot.NUMBERS, variant, noise)
        for name, variant in VARIANTS.items() for noise in variant.noises
    }  # fmt: skip
    return {"triton": triton.__version__, "target": "sm_90", "dtype": "bf16", "kernels": kernels}


def _slots(kernel_aot, variant: Variant, noise: str):
    """Instruction slots of one compilation with the variant's constants, in a table of kernels of its own."""
    kernel, constants = kernel_aot.KERNELS[variant.kernel]
    changes = variant.changes | (READS[noise] if variant.noises == STORED else {})
    table = kernel_aot.KERNELS | {variant.kernel: (kernel, constants | changes)}
    with mock.patch.object(kernel_aot, "KERNELS", table):
        return kernel_aot.figures(variant.kernel, "sm_90", noise if noise in DRAWN else variant.compiled).slots


def _per_element(slots, numbers: int, variant: Variant, noise: str) -> dict:
    """Per element."""
    outside = slots.outside / numbers
    if variant.shortest:
        return {"loop": slots.shortest / numbers, "special": 0.0, "wide": 0.0, "outside": outside}
    unrolled = variant.loads and noise not in DRAWN
    turns = numbers * (slots.loads // variant.loads if unrolled else 1)
    found = {name: value / turns for name, value in asdict(slots).items() if name in ("loop", "special", "wide")}
    return found | ({"outside": outside} if variant.loops else {"outside": 0.0, "loop": outside})


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
