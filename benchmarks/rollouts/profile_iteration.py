"""The ten largest costs of one real iteration:

    python benchmarks/rollouts/profile_iteration.py                     ours, exact; digits on a CPU, SD3.5-M on a GPU
    python benchmarks/rollouts/profile_iteration.py --variant official --architecture sd35-medium-512
    python benchmarks/rollouts/profile_iteration.py --set explore.prompts=1 --out FILE.md

One iteration (after two to warm up) runs under torch.profiler. Time is that of the device: kernels on a GPU, operators
on a CPU, each counted once, without what it calls. Costs of one kind are added up: all matrix products, all attention,
all convolutions and so on, with the kernel or operator that took most of it; the shares are of the whole iteration, so
what is missing to 1 is a GPU that waits, or on a CPU Python between the operators. Profiling slows the host, not the
kernels.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import importable  # noqa: F401, isort: skip

import torch
from machine.environment import environment
from rollouts.architectures import ARCHITECTURES
from rollouts.bench import Bench, iterate, warm_up
from rollouts.compare import override, say
from rollouts.variants import EXACT_END, VARIANTS
from torch.profiler import ProfilerActivity, profile

KINDS = (
    ("compiled chains: norms, elementwise", r"^triton_(?!tem)|cpp_fused|CompiledFxGraph"),
    ("guards of compiled code", r"TorchDynamo"),
    ("fp8 matrix products", r"scaled_mm|e4m3|fp8"),
    ("attention", r"attention|flash|fmha|sdpa|cudnn_generated_fort_native_sdpa"),
    ("convolutions", r"conv|wgrad|dgrad|implicit|nchwToNhwc|nhwcToNchw|xmma_fprop"),
    ("matrix products", r"gemm|(?<![a-z])mm(?![a-z])|addmm|bmm|matmul|linear|cutlass|nvjet|ampere_|sm90_xmma"),
    ("tempflow_kernels: step, noise, loss", r"tempflow|transition|philox|branch_loss|_noise"),
    ("optimizer", r"adam|foreach|multi_tensor"),
    ("norms", r"norm|rsqrt|layer_norm|rms"),
    ("softmax", r"softmax"),
    ("resizing images", r"upsample|interpolate|resize|antialias"),
    ("copies to and from the host", r"memcpy.*(htod|dtoh|pageable|pinned)"),
    ("copies and type conversion", r"copy|memcpy|_to_copy|\bcat\b|clone|contiguous|index|gather|memset|fill|zero"),
    ("elementwise", r"elementwise|vectorized|\bmul|\badd|\bsub|\bdiv|gelu|silu|tanh|sigmoid|exp|clamp|where|round"),
)
"""name -> pattern of kernels and operators, first match counts"""


@dataclass(frozen=True)
class Cost:
    name: str
    seconds: float
    calls: int
    largest: str
    """the kernel or operator that took most of it"""


def kind_of(name: str) -> str:
    short = name.removeprefix("aten::")
    return next((kind for kind, pattern in KINDS if re.search(pattern, short, re.IGNORECASE)), f"other: {short[:40]}")


def costs(measured: profile, on_gpu: bool) -> list[Cost]:
    """Costs by kind, largest first."""
    seconds, calls, members = defaultdict(float), defaultdict(int), defaultdict(lambda: defaultdict(float))
    for event in measured.key_averages():
        on_device = event.device_type == torch.autograd.DeviceType.CUDA
        if on_device != on_gpu or is_frame(event.key):
            continue
        own = (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e6
        kind = kind_of(event.key)
        seconds[kind] += own
        calls[kind] += event.count
        members[kind][event.key] += own
    largest = {kind: max(of_kind, key=of_kind.get) for kind, of_kind in members.items()}
    found = [Cost(kind, value, calls[kind], largest[kind]) for kind, value in seconds.items()]
    return sorted(found, key=lambda cost: -cost.seconds)


def is_frame(name: str) -> bool:
    """Marks of the profiler, of autograd and of compiled regions, which do no work of their own on a device."""
    return name.startswith(("ProfilerStep", "autograd::engine", "Torch-Compiled", "cudaLaunch", "Optimizer."))


def table(found: list[Cost], seconds: float, head: str) -> str:
    lines = [head, "", "| | cost | share | seconds | calls | most of it |", "| --- | --- | --- | --- | --- | --- |"]
    for place, cost in enumerate(found[:10], 1):
        name = cost.largest.replace("|", "/")
        name = name if len(name) <= 60 else name[:57] + "..."
        lines.append(f"| {place} | {cost.name} | {cost.seconds / seconds:.1%} | {cost.seconds:.3f} | {cost.calls:,} "
                     f"| `{name}` |")  # fmt: skip
    rest, all_of = sum(cost.seconds for cost in found[10:]), sum(cost.seconds for cost in found)
    last = f"All else measured: {rest / seconds:.1%}. Measured in all: {all_of / seconds:.1%} of {seconds:.2f} s."
    return "\n".join([*lines, "", last])


def profiled(bench: Bench, variant_name: str) -> str:
    """The table of one variant."""
    variant = next(variant for variant in VARIANTS if variant.name == variant_name)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if bench.on_gpu else [])]
    with bench.texts():
        case = bench.case(variant)
        warm_up(case), warm_up(case)
        plain = iterate(case, 0)
        with profile(activities=activities, acc_events=True) as measured:
            result = iterate(case, 0)
    about: dict[str, Any] = environment(bench.device)
    phases = ", ".join(f"{phase} {seconds:.2f}" for phase, seconds in plain.phases.items())
    head = (
        f"`{variant.name}`, {bench.name} on {about['device']}, torch {about['torch']}, commit {about['commit']}, "
        f"{about['date']}: {plain.seconds:.2f} s an iteration ({result.seconds:.2f} s under the profiler) of "
        f"{case.rollouts} branch rollouts; seconds by phase, unprofiled: {phases}."
    )
    return table(costs(measured, bench.on_gpu), result.seconds, head)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", choices=["digits", *ARCHITECTURES])
    parser.add_argument("--variant", choices=[variant.name for variant in VARIANTS], default=EXACT_END)
    parser.add_argument("--set", type=override, action="append", default=[], metavar="section.field=value")
    parser.add_argument("--out", type=Path, help="also write the table to this file")
    asked = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = asked.architecture or ("sd35-medium-512" if device.type == "cuda" else "digits")
    with tempfile.TemporaryDirectory(prefix="profile-") as workshop:
        text = profiled(Bench(name, device, Path(workshop), dict(asked.set)), asked.variant)
    say(text)
    if asked.out:
        asked.out.parent.mkdir(parents=True, exist_ok=True)
        asked.out.write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
