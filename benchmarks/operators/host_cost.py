"""What a call costs the host: Python, dispatcher and autograd of the operators, without any kernel.

    python benchmarks/operators/host_cost.py                          this checkout
    python benchmarks/operators/host_cost.py --against OTHER/kernels  and another one, turn by turn, for comparison

The Triton backend runs on CPU tensors in a process of its own, on a driver that launches nothing, so no GPU is needed.
What is left is the host's part of a call with Triton's look-up of the kernel; what is not in it is the Python of
Triton's CudaLauncher and the driver's call, of every launch, which are not measured. Each figure is the median of many
calls in one process, and of several processes the least, which other load disturbs least.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

KERNELS = Path(__file__).resolve().parents[2] / "kernels"
CALLS = ("step", "ode step", "log_prob", "log_ratio", "loss forward", "loss and backward")
ROWS, SIBLINGS, SHAPE = 4, 6, (16, 64, 64)


class NoDriver:
    """Stands for a GPU: kernels are compiled for sm_90 and looked up as usual, launches do nothing."""

    class utils:
        load_binary = staticmethod(lambda *_: (1, 1, 32, 0, 1024))
        unload_module = staticmethod(lambda *_: None)
        get_device_properties = staticmethod(
            lambda _: {"max_shared_mem": 2**17, "multiprocessor_count": 132, "warpSize": 32}
        )

    get_current_target = staticmethod(lambda: triton_target())
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda _: 0)
    launcher_cls = staticmethod(lambda *_: lambda *_: None)


def triton_target():
    from triton.backends.compiler import GPUTarget

    return GPUTarget("cuda", 90, 32)


def calls(backend="triton"):
    """{name: callable} on CPU tensors of (4, 16, 64, 64), K = 6."""
    import tempflow_kernels as tk
    import torch

    assert tk.backend_info()["cpu"] == backend, "TEMPFLOW_KERNELS_BACKEND chooses the backend of a CPU"
    latents, velocity, velocity_old = (torch.randn(ROWS, *SHAPE) for _ in range(3))
    leaf = velocity.clone().requires_grad_()
    coef = torch.tensor([[0.9, -0.1, 0.3]]).repeat(ROWS, 1)
    ode = torch.tensor([[1.0, -0.1, 0.0]]).repeat(ROWS, 1)
    key = torch.arange(2 * ROWS).view(ROWS, 2)
    advantages, terms = torch.randn(ROWS, SIBLINGS), tk.gaussian_terms(coef)
    following = torch.randn(ROWS, SIBLINGS, *SHAPE)

    def loss():
        return tk.branch_loss(leaf, velocity_old, advantages, terms, key)[0]

    def learn():
        leaf.grad = None
        loss().backward()

    found = (
        lambda: tk.transition_step(latents, velocity, coef, key, SIBLINGS),
        lambda: tk.transition_step(latents, velocity, ode, key),
        lambda: tk.transition_log_prob(following, latents, velocity, coef),
        lambda: tk.log_ratio(velocity, velocity_old, coef, key, SIBLINGS),
        loss,
        learn,
    )
    return dict(zip(CALLS, found, strict=True))


def microseconds(call, count):
    """The median of `count` calls."""
    times = []
    for _ in range(count):
        start = time.perf_counter_ns()
        call()
        times.append(time.perf_counter_ns() - start)
    return statistics.median(times) / 1e3


def measure_here(count):
    """{name: us} in this process, whose environment chose the backend."""
    import torch
    from triton.runtime import driver

    torch.set_num_threads(1)
    driver.set_active(NoDriver())
    found = calls()
    for call in found.values():
        microseconds(call, 50)
    return {name: microseconds(call, count) for name, call in found.items()}


def measure(kernels=KERNELS, count=1000):
    """{name: us} of the package in the folder `kernels`, in a process of its own."""
    path = os.pathsep.join([str(kernels), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"TEMPFLOW_KERNELS_BACKEND": "triton", "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, __file__, "--count", str(count), "--here"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return json.loads(run.stdout)


def least_of(rounds, folders, count):
    """{folder: {name: us}}, the folders turn by turn."""
    found = {folder: [] for folder in folders}
    for _ in range(rounds):
        for folder, measured in found.items():
            measured.append(measure(folder, count))
    return {folder: {name: min(row[name] for row in rows) for name in CALLS} for folder, rows in found.items()}


def parse():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--against", type=Path, help="the `kernels` folder of another checkout")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def main():
    options = parse()
    if options.here:
        print(json.dumps(measure_here(options.count)))
        return
    folders = [folder.resolve() for folder in (options.against, KERNELS) if folder]
    found = least_of(options.rounds, folders, options.count)
    print("us a call: " + ", ".join(str(folder) for folder in folders))
    for name in CALLS:
        print(f"{name:18}" + "".join(f"{found[folder][name]:9.1f}" for folder in folders))


if __name__ == "__main__":
    main()
