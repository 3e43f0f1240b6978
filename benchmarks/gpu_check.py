"""Everything that needs a GPU, in one command of less than nine minutes:

    python benchmarks/gpu_check.py [--out benchmarks/results/gpu] [--minutes 8.5]

1. numerics on the device against the float64 oracle (the contract of tests/kernel_contract.py, all dtypes);
2. determinism: 100 repeats bit-identical, and the noise bit-identical to the CPU twin;
3. CUDA-graph capture, replayed with changing keys and coefficients, against eager calls;
4. compute-sanitizer, where it is installed, on one small call of every kernel;
5. speed: copy bandwidth and launch floor, then every operator against eager torch and torch.compile.

Every part runs even if an earlier one failed; the exit status is 1 if any did. Without a GPU,
`TRITON_INTERPRET=1 python benchmarks/gpu_check.py --device cpu --tiny` walks the same code with small sizes.
"""

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests")]
if importlib.util.find_spec("tempflow_kernels") is None:
    sys.path.insert(0, str(ROOT / "kernels"))  # not installed: the sources beside this file

import kernel_contract as contract  # noqa: E402
import torch  # noqa: E402
from kernel_bench import OPERATORS, Inputs, Setting, bytes_moved, eager, environment, fused, peak_bytes  # noqa: E402
from kernel_cases import Case  # noqa: E402
from kernel_report import write  # noqa: E402
from tempflow_kernels import native, native_ops, triton_ops  # noqa: E402

MAX_BYTES = 6 << 30  # largest (R, K, d) array of the speed part; the eager sequence holds several of them
SIZES = ((1, 1), (4, 6), (16, 6), (64, 6), (4, 24), (16, 24), (64, 1))
COMPILED = ((4, 6), (16, 6), (4, 24))


def log(*parts):
    print(*parts, flush=True)


def check_numerics(options):
    """The contract of the backends, on this device."""
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
    log(f"  {len(contract.CASES)} cases within twice the error of plain torch")


def all_outputs(case):
    """Every result of one call of every operator."""
    loss, stats, slopes = triton_ops.branch_loss(*case.loss_arguments())
    gradients = triton_ops.velocity_gradient(slopes, loss, *case.gradient_arguments())
    step = (case.latents, case.velocity, case.coef, case.key, case.siblings, case.velocity_uncond, case.guidance)
    following, log_prob = triton_ops.transition_step(*step)
    again = triton_ops.transition_log_prob(following, case.latents, case.velocity, case.coef)
    return [loss, stats, slopes, *gradients, following, log_prob, again]


def check_determinism(options):
    """Bit-identical repeats, and the same noise as on the CPU."""
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
    """One capture; replays follow keys and coefficients, because both live in device tensors."""
    if options.device == "cpu":
        log("  skipped: no GPU")
        return
    case = Case(shape=(16, 64, 64), siblings=6, device=options.device)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        all_outputs(case)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = all_outputs(case)
    for change in range(5):
        case.key.add_(1000 + change)
        case.coef.mul_(0.99)
        graph.replay()
        torch.cuda.synchronize()
        replayed = [tensor.clone() for tensor in captured]
        assert all(map(torch.equal, replayed, all_outputs(case))), f"replay {change} differs from the eager call"
    log("  5 replays with changed keys and coefficients equal eager calls bit for bit")


def check_sanitizer(options):
    """memcheck over one call of every kernel, odd sizes included."""
    tool = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if tool is None or options.device == "cpu":
        log("  skipped: " + ("no GPU" if options.device == "cpu" else "compute-sanitizer is not installed"))
        return
    command = [tool, "--error-exitcode", "9", sys.executable, __file__, "--sanitized"]
    environment_ = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=100, env=environment_)
    except subprocess.TimeoutExpired:
        log("  not finished within 100 s: no verdict")
        return
    log("  " + (run.stdout.strip().splitlines() or ["no output"])[-1])
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]


def run_sanitized():
    """What compute-sanitizer watches."""
    for shape in ((3, 7, 11), (1,), (2049,), (16, 16)):
        all_outputs(Case(shape=shape, device="cuda"))
    torch.cuda.synchronize()


def timer(options):
    """A function from a callable to (median ms, interquartile range ms) on this device."""
    if options.device == "cpu":
        return _time_on_cpu
    from triton.testing import do_bench

    def measure(call):
        middle, low, high = do_bench(call, warmup=20, rep=80, quantiles=[0.5, 0.25, 0.75])
        return middle, high - low

    return measure


def _time_on_cpu(call):
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start), 0.0


def graph_time(options, call):
    """Milliseconds per call inside a CUDA graph: device time without launch overhead; None without a GPU."""
    if options.device == "cpu":
        return None
    from triton.testing import do_bench_cudagraph

    return do_bench_cudagraph(call, rep=40)


def settings(options):
    """Sizes of real use, those first that matter most."""
    if options.tiny:
        return [Setting("tiny", 2, 2, torch.float32, options.device)]
    shapes = ("sd35_512", "sd35_1024", "flux_1024", "wan_480p")
    chosen = [Setting(shape, *size, torch.bfloat16, options.device) for size in SIZES for shape in shapes]
    return [setting for setting in chosen if 4 * setting.elements * setting.siblings <= MAX_BYTES]


def measure_bounds(options, measure):
    """Copy bandwidth at 256 MiB and the cost of an operation that does nothing."""
    count = 2**10 if options.tiny else 2**26
    source = torch.randn(count, device=options.device)
    target, one = torch.empty_like(source), torch.zeros(1, device=options.device)
    rows = []
    for operator, call, size in (("copy", lambda: target.copy_(source), 8 * count), ("launch", lambda: one.add_(1), 8)):
        median, spread = measure(call)
        rows.append({"operator": operator, "provider": "bound", "bytes": size, "median_ms": median, "iqr_ms": spread})
        rows[-1] |= {"graph_ms": graph_time(options, call)} | environment(options.device)
        log(f"  {operator}: {median:.4f} ms, {size / median / 1e6:.0f} GB/s")
    return rows


def measure_speed(options):
    """All rows; stops in time, saying what was left out."""
    measure = timer(options)
    rows = measure_bounds(options, measure)
    compiled_sizes = COMPILED if not options.tiny else ()
    for setting in settings(options):
        if time.monotonic() > options.deadline:
            log(f"  out of time before {setting.label}: this and what follows was not measured")
            break
        inputs = Inputs(setting)
        providers = {"fused": fused(inputs), "eager": eager(inputs)}
        if (setting.rows, setting.siblings) in compiled_sizes and time.monotonic() < options.deadline - 60:
            torch._dynamo.reset()
            providers["compiled"] = eager(inputs, lambda function: torch.compile(function, dynamic=False))
        for operator in OPERATORS:
            for provider, calls in providers.items():
                if (operator, provider) != ("normal", "compiled"):
                    rows.append(_row(options, measure, setting, operator, provider, calls[operator]))
        del inputs, providers
        write(rows, options.out)
    return rows


def _row(options, measure, setting, operator, provider, call):
    median, spread = measure(call)
    size = {"shape": setting.shape, "rows": setting.rows, "siblings": setting.siblings, "dtype": str(setting.dtype)}
    row = {"operator": operator, "provider": provider, **size, "median_ms": median, "iqr_ms": spread}
    row["graph_ms"] = graph_time(options, call) if provider == "fused" else None
    row |= {"bytes": bytes_moved(operator, setting), "peak_bytes": peak_bytes(call, options.device)}
    in_graph = f", {row['graph_ms']:.4f} in a graph" if row["graph_ms"] else ""
    log(f"  {operator} {provider} {setting.label}: {median:.4f} ms{in_graph}")
    return row | environment(options.device)


def check_speed(options):
    """Measure, write rows, table and plot, and show the table."""
    write(measure_speed(options), options.out)
    log((options.out / "table.md").read_text())


PARTS = {
    "numerics": check_numerics,
    "determinism": check_determinism,
    "graph": check_graph,
    "sanitizer": check_sanitizer,
    "speed": check_speed,
}


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "gpu")
    parser.add_argument("--minutes", type=float, default=8.5, help="the speed part stops when they are over")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--tiny", action="store_true", help="small sizes, to walk the code without a GPU")
    parser.add_argument("--sanitized", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def main():
    options = parse()
    if options.sanitized:
        run_sanitized()
        return 0
    options.deadline = time.monotonic() + 60 * options.minutes
    log(json.dumps(environment(options.device)))
    verdicts = {}
    for name in options.parts:
        start = time.monotonic()
        log(f"== {name}")
        try:
            PARTS[name](options)
            verdicts[name] = "ok"
        except Exception:  # the other parts still have something to say; the status reports it
            traceback.print_exc()
            verdicts[name] = "FAILED"
        log(f"== {name}: {verdicts[name]} after {time.monotonic() - start:.0f} s")
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "verdicts.json").write_text(json.dumps(verdicts | environment(options.device)) + "\n")
    log(json.dumps(verdicts))
    return int("FAILED" in verdicts.values())


if __name__ == "__main__":
    sys.exit(main())
