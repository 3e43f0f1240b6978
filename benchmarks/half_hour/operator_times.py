"""Times of every operator in the order of their worth, with device timers; one row is written at a time."""

import statistics
import time

import torch
from half_hour.measure import Broken, Unfinished
from half_hour.runner import rows_of
from machine.environment import peak_bytes, still_works
from operators.callables import POINTS, STORED, Inputs, Setting, bytes_moved, callables, kernels_alone
from tempflow_kernels import use_noise

MODES = ("fast", "exact")
"""Noise that the fused operators draw, the default first; with STORED the loss reads it."""

MAX_BYTES = 6 << 30  # largest (R, K, d) fp32 array; the eager sequences hold several of them
CORE = [("sd35_512", 128, 6), ("sd35_512", 256, 1), ("sd35_512", 32, 24), ("sd35_512", 4, 6)]
"""64 MiB and more, for which the goals are stated, and the size of one call of the trainer"""
COMPILED = [("sd35_512", 128, 6), ("sd35_512", 4, 6)]
SHAPES = ("sd35_512", "flux_1024", "sd35_1024", "wan_480p")
COMPILATION = 45  # seconds that torch.compile may need for one sequence
COUNTS = ((4, 6), (1, 1), (16, 6), (4, 24), (64, 1))
GRAPHED = (("step", "forward"), ("loss", "full"))
"""What is timed in a graph of eager and compiled sequences, too: goals compare it with ours."""


def log(*parts):
    print(*parts, flush=True)


def plan(options):
    """(setting, provider, noise) in the order of their worth: time may end the list anywhere."""
    if options.tiny:
        setting = Setting("tiny", 2, 6, torch.float32, options.device)
        return [(setting, "fused", mode) for mode in (*MODES, STORED)] + [(setting, "eager", None)]
    sizes = list(dict.fromkeys([*CORE, *((shape, *counts) for counts in COUNTS for shape in SHAPES)]))
    order = [(size, "fused", mode) for size in CORE for mode in MODES]
    order += [(size, "fused", STORED) for size in CORE]
    order += [(size, provider, None) for size in COMPILED for provider in ("eager", "compiled", "stored")]
    order += [(size, "fused", MODES[0]) for size in sizes] + [(size, "eager", None) for size in sizes]
    settings = [(Setting(*size, torch.bfloat16, options.device), *rest) for size, *rest in dict.fromkeys(order)]
    return [job for job in settings if 4 * job[0].elements * job[0].siblings <= MAX_BYTES]


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
    graph, stream, before = torch.cuda.CUDAGraph(), torch.cuda.Stream(), torch.cuda.current_stream()
    stream.wait_stream(before)
    with torch.cuda.stream(stream):
        call()
    before.wait_stream(stream)
    try:
        with torch.cuda.graph(graph):
            for _ in range(calls):
                call()
    finally:
        torch.cuda.set_stream(before)  # torch leaves the capturing one in place where a capture fails
    graph.replay()
    return statistics.median(_replay_ms(graph) / calls for _ in range(replays))


def _replay_ms(graph):
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    graph.replay()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def measure_operators(options):
    """A row per figure that is not in the file yet.

    Raises:
        Unfinished: the time was over before the last.
        Broken: a figure broke the process; it is in the file with its problem, and the next process goes on after it.
    """
    measure, done = timer(options.device), {place(row) for row in rows_of(options.file)}
    if not done:
        measure_bounds(options, measure)
    for setting, provider, noise in plan(options):
        if noise in MODES:
            use_noise(noise)
        try:
            _measure(options, measure, (setting, provider, noise), done)
        except torch.OutOfMemoryError as error:
            log(f"{setting.label} {provider} does not fit: {_words(error)}")
            torch.cuda.empty_cache()


def _words(error):
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def place(row):
    """What a figure is about."""
    return tuple(row.get(name) for name in ("operator", "mode", "provider", "noise", "shape", "rows", "siblings"))


def measure_bounds(options, measure):
    """Copy bandwidth at 256 MiB and the cost of an operation that does nothing."""
    count = 2**10 if options.tiny else 2**26
    source = torch.randn(count, device=options.device)
    target, one = torch.empty_like(source), torch.zeros(1, device=options.device)
    for operator, call, size in (("copy", lambda: target.copy_(source), 8 * count), ("launch", lambda: one.add_(1), 8)):
        log(operator)
        row = {"operator": operator, "provider": "bound", "bytes": size}
        options.write(**row, **_figures(options, measure, call, call))
        _go_on(options, operator)


def _measure(options, measure, job, done):
    """All points of one setting, provider and noise that are not done."""
    setting, provider, noise = job
    calls, alone, inputs = None, {}, None
    for point in POINTS:
        row = {"operator": point[0], "mode": point[1], "provider": provider, "noise": noise, **setting.row}
        if place(row) in done:
            continue
        if options.left() < (COMPILATION if provider in ("compiled", "stored") and calls is None else 0):
            raise Unfinished(f"at {setting.label} {provider}")
        if calls is None:
            inputs = Inputs(setting)
            calls = callables(inputs, provider, noise)
            alone = kernels_alone(inputs, noise) if provider == "fused" else {at: calls.get(at) for at in GRAPHED}
        if point in calls:
            log(f"{' '.join(point)} {setting.label} {provider} {noise or ''}")
            size = bytes_moved(*point, setting, noise)
            options.write(**row, bytes=size, **_figures(options, measure, calls[point], alone.get(point)))
            _go_on(options, f"{' '.join(point)} {setting.label}")


def _go_on(options, what):
    """
    Raises:
        Broken: the figure that was just written says nothing good of the next.
    """
    if not still_works(options.device):
        raise Broken(f"the device is out of order since {what}")


NONE = {"median_ms": None, "iqr_ms": None, "graph_ms": None, "peak_bytes": None}


def _figures(options, measure, call, alone):
    """Times and memory of a call; what fails is None, and `problem` says why. Too little memory is the caller's."""
    found = dict(NONE)
    try:
        call()  # compiles
        found["median_ms"], found["iqr_ms"] = measure(call)
        found["peak_bytes"] = peak_bytes(call, options.device)
        found["graph_ms"] = graph_time(options.device, alone)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        log(f"failed: {_words(error)}")
        return found | {"problem": _words(error)}
    log(f"  {found['median_ms']:.4f} ms, in a graph {found['graph_ms']}")
    return found | {"problem": ""}
