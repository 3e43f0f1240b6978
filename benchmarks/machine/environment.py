"""The machine of a measurement: its description for every row, waiting for the device, and memory at the peak."""

import ctypes
import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
import time
from importlib import metadata
from pathlib import Path

import tempflow_kernels as tk
import torch

PROCESS = Path("/proc/self")
RESULTS = ":!benchmarks/results"
"""to git: leave these out; a benchmark that writes its results changes no source"""


def synchronised(call, device):
    """The call with the device's work finished inside it, for timers that know nothing of devices."""
    if torch.device(device).type != "cuda":
        return call

    def finish():
        result = call()
        torch.cuda.synchronize()
        return result

    return finish


def still_works(device):
    """Whether the device takes work from this process, after an error: a broken CUDA context never does again."""
    if torch.device(device).type != "cuda":
        return True
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def peak_bytes(call, device):
    """Largest amount of memory that one call adds; None where the system does not tell.

    On CPU this is resident memory at its peak, so scratch space of C++ code counts too; exact to a few pages.
    """
    if torch.device(device).type != "cuda":
        return _peak_of_process(call)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    del result
    return torch.cuda.max_memory_allocated() - before


def _peak_of_process(call):
    if not os.access(PROCESS / "clear_refs", os.W_OK) or platform.libc_ver()[0] != "glibc":
        return None
    ctypes.CDLL(None).malloc_trim(0)  # give freed memory back, so that the call has to ask for what it uses
    (PROCESS / "clear_refs").write_text("5")  # resets the peak
    before = _status("VmRSS")
    result = call()
    peak = _status("VmHWM")
    del result
    return max(0, peak - before)


def _status(field):
    return 1024 * int(re.search(rf"^{field}:\s+(\d+) kB", (PROCESS / "status").read_text(), re.MULTILINE)[1])


@functools.cache
def environment(device):
    """Device, versions, commit and date, for every figure."""
    is_cuda = torch.device(device).type == "cuda"
    backends = tk.backend_info()
    return {
        "device": torch.cuda.get_device_name() if is_cuda else cpu_name(),
        "threads": None if is_cuda else torch.get_num_threads(),
        "backend": backends["cuda" if is_cuda else "cpu"],
        "native": backends["native"].split(",")[0],
        "driver": _driver() if is_cuda else None,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "python": platform.python_version(),
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%d"),
    }


def _commit():
    """Short hash of the commit, `-dirty-` and one of the difference where tracked files differ from it; `unknown`
    without git or a repository."""
    if shutil.which("git") is None:
        return "unknown"
    root = Path(__file__).resolve().parents[2]
    commit, changes = (
        subprocess.run(["git", "-C", root, *command], capture_output=True).stdout.strip()
        for command in (["rev-parse", "--short", "HEAD"], ["diff", "HEAD", "--binary", "--", ".", RESULTS])
    )
    mark = f"-dirty-{hashlib.sha256(changes).hexdigest()[:8]}" if changes else ""
    return commit.decode() + mark or "unknown"


def _driver():
    """Version of the GPU's driver, as its own tool tells."""
    if shutil.which("nvidia-smi") is None:
        return "unknown"
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True).stdout.split("\n")[0].strip() or "unknown"


def cpu_name():
    lines = Path("/proc/cpuinfo").read_text().splitlines() if os.path.exists("/proc/cpuinfo") else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]} ({os.cpu_count()} cores)" if names else platform.processor()


def _version(distribution):
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
