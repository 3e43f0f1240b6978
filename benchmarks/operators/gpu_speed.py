"""The speed part of `gpu_check.py`: what is measured in which order, with device timers, one row written at a time."""

import json
import statistics
import time

import tempflow_kernels as tk
import torch
from machine.environment import environment, peak_bytes
from operators.callables import POINTS, Inputs, Setting, bytes_moved, callables, kernels_alone

MAX_BYTES = 6 << 30  # largest (R, K, d) fp32 array; the eager sequences hold several of them
CORE = [("sd35_512", 4, 6), ("flux_1024", 4, 6)]
COMPILED = [("sd35_512", 4, 6), ("flux_1024", 4, 6), ("sd35_512", 1, 1)]
SHAPES = ("sd35_512", "flux_1024", "sd35_1024", "wan_480p")
COMPILATION = 45  # seconds that torch.compile may need for one sequence
COUNTS = ((1, 1), (4, 6), (16, 6), (4, 24), (64, 1), (64, 6), (16, 24))


def log(*parts):
    print(*parts, flush=True)


def plan(options):
    """(setting, provider) in the order of their worth: time may end the list anywhere."""
    if options.tiny:
        setting = Setting("tiny", 2, 2, torch.float32, options.device)
        return [(setting, "fused"), (setting, "eager")]
    others = [(shape, *counts) for counts in COUNTS for shape in SHAPES]
    sizes = list(dict.fromkeys([*CORE, *others]))
    order = [(size, provider) for size in sizes for provider in ("fused", "eager")]
    place = 2 * len(CORE)
    order[place:place] = [(size, "compiled") for size in COMPILED]
    settings = [(Setting(*size, torch.bfloat16, options.device), provider) for size, provider in order]
    return [pair for pair in settings if 4 * pair[0].elements * pair[0].siblings <= MAX_BYTES]


def timer(device):
    """A function from a callable to (median ms, interquartile range ms) on this device."""
    if device == "cpu":
        return _time_on_cpu
    from triton.testing import do_bench

    def measure(call):
        middle, low, high = do_bench(call, warmup=15, rep=60, quantiles=[0.5, 0.25, 0.75])
        return middle, high - low

    return measure


def _time_on_cpu(call):
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start), 0.0


def graph_time(device, call, calls=20, replays=7):
    """Median milliseconds per call inside a CUDA graph: device time without launches, caches warm; None on CPU."""
    if device == "cpu" or call is None:
        return None
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.no_grad(), torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.no_grad(), torch.cuda.graph(graph):
        for _ in range(calls):
            call()
    graph.replay()
    times = []
    for _ in range(replays):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / calls)
    return statistics.median(times)


def measure_speed(options):
    """Appends one row per figure to rows.jsonl; stops in time, saying what was left out."""
    measure = timer(options.device)
    options.out.mkdir(parents=True, exist_ok=True)
    with (options.out / "rows.jsonl").open("a") as file:

        def add(row):
            file.write(json.dumps(row | environment(options.device)) + "\n")
            file.flush()

        measure_bounds(options, measure, add)
        for setting, provider in plan(options):
            try:
                done = _measure(options, measure, setting, provider, add)
            except torch.OutOfMemoryError as error:
                log(f"  {setting.label} {provider} does not fit: {str(error).splitlines()[0]}")
                torch.cuda.empty_cache()
                continue
            if not done:
                log(f"  out of time at {setting.label} {provider}: the rest of it and what follows was not measured")
                return


def measure_bounds(options, measure, add):
    """Copy bandwidth at 256 MiB and the cost of an operation that does nothing."""
    count = 2**10 if options.tiny else 2**26
    source = torch.randn(count, device=options.device)
    target, one = torch.empty_like(source), torch.zeros(1, device=options.device)
    for operator, call, size in (("copy", lambda: target.copy_(source), 8 * count), ("launch", lambda: one.add_(1), 8)):
        median, spread = measure(call)
        row = {"operator": operator, "provider": "bound", "bytes": size, "median_ms": median, "iqr_ms": spread}
        add(row | {"graph_ms": graph_time(options.device, call)})
        log(f"  {operator}: {median:.4f} ms, {size / median / 1e6:.0f} GB/s")


def _measure(options, measure, setting, provider, add):
    """All points of one setting and provider; False if the time ran out before the last."""
    inputs = Inputs(setting)
    calls = callables(inputs, provider)
    alone = kernels_alone(inputs) if provider == "fused" else {}
    deadline = options.deadline - (COMPILATION if provider == "compiled" else 0)
    for operator, mode in POINTS:
        if (operator, mode) not in calls:
            continue
        if time.monotonic() > deadline:
            return False
        call = calls[operator, mode]
        call()  # compiles
        median, spread = measure(call)
        row = {"operator": operator, "mode": mode, "provider": provider, **setting.row, "median_ms": median}
        row |= {"iqr_ms": spread, "graph_ms": graph_time(options.device, alone.get((operator, mode)))}
        row |= {"noise": tk.noise_mode()}
        row |= {"bytes": bytes_moved(operator, mode, setting), "peak_bytes": peak_bytes(call, options.device)}
        in_graph = f", {row['graph_ms']:.4f} in a graph" if row["graph_ms"] else ""
        log(f"  {operator} {mode} {provider} {setting.label}: {median:.4f} ms{in_graph}")
        add(row)
    return True
