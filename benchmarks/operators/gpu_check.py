"""Everything that needs a GPU, in one command of less than nine minutes:

    python benchmarks/operators/gpu_check.py [--out benchmarks/results/gpu] [--minutes 8.5]

1. numerics on the device against the float64 oracle (the contract of tests/support/kernel_contract.py, all dtypes);
2. determinism: 100 repeats bit-identical, and the noise compared with the CPU twin;
3. CUDA-graph capture, replayed with changing keys, coefficients and terms, against eager calls;
4. compute-sanitizer, where it is installed, on one small call of every kernel;
5. speed (gpu_speed.py): copy bandwidth and launch floor, then every operator and mode against eager torch and
   torch.compile. Rows are written one by one; a table and a plot come from what is there when the time is over.

Every part is a process of its own with a time limit, so that a crash, a poisoned CUDA context or a hang of one part
stays there. Exit status: 0 if every part passed or had a stated reason to be skipped, 1 if one failed or ran out of
time, 2 for wrong use (no GPU, an unknown option). Without a GPU,
`TRITON_INTERPRET=1 python benchmarks/operators/gpu_check.py --device cpu --tiny` walks the same code with small sizes.
"""

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

STARTED = time.monotonic()
ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests" / "support")]
if importlib.util.find_spec("tempflow_kernels") is None:
    sys.path.insert(0, str(ROOT / "kernels"))  # not installed: the sources beside this file

import kernel_contract as contract  # noqa: E402
import tempflow_kernels as tk  # noqa: E402
import torch  # noqa: E402
from kernel_cases import Case  # noqa: E402
from machine.environment import environment  # noqa: E402
from operators.gpu_speed import measure_speed  # noqa: E402
from operators.report import read, report  # noqa: E402
from tempflow_kernels.cpu import library as native  # noqa: E402
from tempflow_kernels.cpu import ops as native_ops  # noqa: E402
from tempflow_kernels.gpu import ops as triton_ops  # noqa: E402

SKIPPED = 77  # exit status of a part that had nothing to do
LIMITS = {"numerics": 170, "determinism": 60, "graph": 60, "sanitizer": 110, "speed": 500}
"""Seconds per part; none runs beyond --minutes."""


class Skip(Exception):
    """A part cannot run here; the message says why."""


def log(*parts):
    print(*parts, flush=True)


def check_numerics(options):
    """The contract of the backends, on this device: with exact noise; then what fast noise may differ by."""
    tk.use_noise("exact")
    failures = []
    for case in contract.CASES:
        case = contract.on_device(case, options.device)
        drawn = contract.unnumbered(case)
        checks = [(contract.check_loss, case), (contract.check_log_ratio, case)]
        checks += [(check, drawn) for check in (contract.check_noise, contract.check_step, contract.check_log_prob)]
        for check, arguments in checks:
            try:
                check(triton_ops, arguments)
            except AssertionError as error:
                failures.append(f"{check.__name__} {arguments}: {error}")
    contract.check_nan(triton_ops, Case(device=options.device))
    assert not failures, "\n".join(failures)
    contract.check_fast_noise(triton_ops, Case(siblings=6, device=options.device))
    log(f"  {len(contract.CASES)} cases within twice the error of plain torch")


def all_outputs(case):
    """Every result of one call of every operator."""
    loss, stats, slopes = triton_ops.branch_loss(*case.loss_arguments)
    gradient = triton_ops.velocity_gradient(case.branches, slopes, loss)
    step = (case.latents, case.velocity, case.coef, case.key, case.siblings, case.velocity_uncond, case.guidance)
    following, log_prob = triton_ops.transition_step(*step)
    given = (following, case.latents, case.velocity, case.coef)
    return [
        loss, stats, slopes, gradient, following, log_prob, triton_ops.transition_log_prob(*given),
        triton_ops.transition_log_prob_gradient(slopes, *given),
        triton_ops.log_ratio(case.ratio_branches, case.siblings),
        triton_ops.normal(case.key, case.siblings, case.elements),
    ]  # fmt: skip


def check_determinism(options):
    """Bit-identical repeats, and the same exact noise as on the CPU."""
    tk.use_noise("exact")
    size = (4, 8, 8) if options.tiny else (16, 64, 64)
    case = Case(shape=size, siblings=6, device=options.device)
    first = all_outputs(case)
    repeats = 2 if options.tiny else 100
    for repeat in range(repeats):
        assert all(map(torch.equal, first, all_outputs(case))), f"repeat {repeat} differs"
    log(f"  {repeats} repeats of every operator bit-identical")
    if not native.available():
        log("  noise against the C++ twin: not compared, the twin is not built")
        return
    found = triton_ops.normal(case.key, 6, case.elements).cpu()
    expected = native_ops.normal(case.key.cpu(), 6, case.elements)
    equal = float((found == expected).float().mean())
    log(f"  noise equal to the C++ twin ({native.describe().split(',')[0]}): {100 * equal:.4f} % of the bit patterns")
    assert float((found - expected).abs().max()) < 1e-6


def check_graph(options):
    """One capture; replays follow keys, coefficients and terms, because all live in device tensors."""
    if options.device == "cpu":
        raise Skip("no GPU")
    case = Case(shape=(16, 64, 64), siblings=6, device=options.device)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        all_outputs(case)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = all_outputs(case)
    before = [torch.full_like(tensor, float("nan")) for tensor in captured]
    for change in range(5):
        case.key.add_(1000 + change)
        case.coef.mul_(0.99)
        case.terms.mul_(0.99)
        graph.replay()
        torch.cuda.synchronize()
        replayed = [tensor.clone() for tensor in captured]
        assert all(map(torch.equal, replayed, all_outputs(case))), f"replay {change} differs from the eager call"
        assert not torch.equal(replayed[-1], before[-1]), f"replay {change} drew the noise of the one before"
        before = replayed
    log("  5 replays with changed keys, coefficients and terms equal eager calls bit for bit")


def check_sanitizer(options):
    """memcheck over one call of every kernel, odd sizes included."""
    tool = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if options.device == "cpu" or tool is None:
        raise Skip("no GPU" if options.device == "cpu" else "compute-sanitizer is not installed")
    # Errors of the API are left out: torch asks the driver for functions that older drivers do not have.
    watch = [tool, "--tool", "memcheck", "--report-api-errors", "no", "--error-exitcode", "9"]
    command = [*watch, sys.executable, __file__, "--part", "sanitized"]
    run = subprocess.run(command, env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
    assert run.returncode == 0, f"compute-sanitizer: exit status {run.returncode}"


def run_sanitized(options):
    """What compute-sanitizer watches."""
    for shape in ((3, 7, 11), (1,), (2049,), (16, 16)):
        all_outputs(Case(shape=shape, device="cuda"))
    torch.cuda.synchronize()


def check_speed(options):
    """Rows of everything that the time allows."""
    measure_speed(options)


PARTS = {
    "numerics": check_numerics,
    "determinism": check_determinism,
    "graph": check_graph,
    "sanitizer": check_sanitizer,
    "speed": check_speed,
}


def run_part(name, options, arguments):
    """One part in a process group of its own: ok, FAILED, skipped or OUT OF TIME."""
    left = options.deadline - time.monotonic()
    if left < 5:
        return "OUT OF TIME"
    limit = min(LIMITS[name], left)
    command = [sys.executable, __file__, *arguments, "--part", name, "--seconds", f"{limit:.0f}"]
    process = subprocess.Popen(command, start_new_session=True)
    try:
        status = process.wait(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # compute-sanitizer has children of its own
        process.wait()
        return "OUT OF TIME"
    return {0: "ok", SKIPPED: "skipped"}.get(status, "FAILED")


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "gpu")
    parser.add_argument("--minutes", type=float, default=8.5, help="for all parts together")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--tiny", action="store_true", help="small sizes, to walk the code without a GPU")
    parser.add_argument("--part", choices=[*PARTS, "sanitized"], help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=500, help=argparse.SUPPRESS)
    return parser.parse_args()


def main():
    options = parse()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("--device: found cuda, but torch sees no GPU; `--device cpu --tiny` walks the code", file=sys.stderr)
        return 2
    if options.part:
        # What is not done 10 seconds before the limit is left out; the speed part watches this.
        options.deadline = STARTED + options.seconds - 10
        try:
            (PARTS | {"sanitized": run_sanitized})[options.part](options)
        except Skip as reason:
            log(f"  skipped: {reason}")
            return SKIPPED
        return 0
    options.deadline = STARTED + 60 * options.minutes
    return run_parts(options)


def run_parts(options):
    """All parts asked for, the report of the rows, and a summary in verdicts.json."""
    options.out.mkdir(parents=True, exist_ok=True)
    if "speed" in options.parts:
        (options.out / "rows.jsonl").unlink(missing_ok=True)
    log(json.dumps(environment(options.device)))
    arguments = ["--device", options.device, "--out", str(options.out), *(["--tiny"] if options.tiny else [])]
    verdicts = {}
    for name in options.parts:
        start = time.monotonic()
        log(f"== {name}")
        verdicts[name] = run_part(name, options, arguments)
        log(f"== {name}: {verdicts[name]} after {time.monotonic() - start:.0f} s")
        (options.out / "verdicts.json").write_text(json.dumps(verdicts | environment(options.device)) + "\n")
    if "speed" in options.parts and (options.out / "rows.jsonl").is_file():
        log(report(read(options.out), options.out))
    log(json.dumps(verdicts))
    return 0 if set(verdicts.values()) <= {"ok", "skipped"} else 1


if __name__ == "__main__":
    sys.exit(main())
