"""Tells what this machine has, and what is missing for which feature: `tempflow doctor`.

Exit code 0: training works here; 1: something that it needs is missing or broken, which the last lines name. A hub that
does not answer is nothing broken.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from http.client import HTTPException
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from tempflow.commands.ending import Parser, end
from tempflow.commands.features import FEATURES, NEEDED, importable
from tempflow.common.errors import BadInput
from tempflow.common.machine import host_memory

SHOWN = ("torch", "diffusers", "transformers", "peft", "safetensors", "triton", "bitsandbytes", "flash-attn")
MOST = 60.0
"""Seconds to wait for the hub."""
DAMAGED = (ImportError, OSError, RuntimeError, AttributeError, ValueError)
"""What importing or calling a package raises that is damaged, or that a variable of the environment misleads."""


class Broken(Exception):
    """Something that training needs does not work; the words say what to do."""


def versions() -> str:
    """What is installed.

    Raises:
        Broken: a package is missing without which nothing works.
    """
    absent = [module for module in NEEDED if not importable(module)]
    if absent:
        raise Broken(f"missing: {', '.join(absent)}; pip install -c constraints.txt -e . brings them")
    found = [f"{name} {number}" for name in SHOWN if (number := _version(name))]
    own = f"tempflow {_version('tempflow') or 'not installed'}"
    return ", ".join([own, f"Python {platform.python_version()}", *found])


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def processors() -> str:
    """Cores, main memory and GPUs."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    own = f"{cores} CPU cores, {host_memory() / 2**30:.1f} GiB of main memory"
    if torch.cuda.is_available():
        return "; ".join([own, *map(_gpu, range(torch.cuda.device_count()))])
    built = torch.version.cuda or torch.version.hip
    driver = shutil.which("nvidia-smi") or Path("/dev/kfd").exists()
    why = "its driver is not in reach" if built else "this build of torch knows no GPUs; install another"
    gpu = f"a GPU may be there, but torch sees none: {why}" if driver else "no GPU"
    return f"{own}; {gpu}; runs go to the CPU"


def _gpu(number: int) -> str:
    import torch

    found = torch.cuda.get_device_properties(number)
    free, total = torch.cuda.mem_get_info(number)
    room = f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
    return f"cuda:{number} {found.name} (compute capability {found.major}.{found.minor}), {room}"


def operators() -> str:
    """Which backend serves which device, tried.

    Raises:
        Broken: one of them draws other noise than its definition, or none.
    """
    import torch
    from tempflow_kernels import backend_info, normal_like
    from tempflow_kernels.plain import reference

    info, keys = backend_info(), torch.tensor([[5, 7]])
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    expected = reference.normal_like(torch.empty(1, 64), keys)
    for device in devices:
        drawn = normal_like(torch.empty(1, 64, device=device), keys.to(device)).cpu()
        if not torch.allclose(drawn, expected, rtol=0, atol=1e-4):  # the fast normals of a GPU are within 1e-5
            raise Broken(f"{info[device]} on {device} draws other numbers than its definition; reinstall kernels/")
    served = ", ".join(f"{device}: {info[device]}" for device in devices)
    return f"{served} (native: {info['native']}; triton: {info['triton']})"


def attention() -> str:
    """Backends of diffusers' dispatcher whose packages are here."""
    from tempflow.models.attention import installed

    return f"{', '.join(installed())}; model.attention=auto measures on a GPU which is fastest"


def disk() -> str:
    """Room here, and where the hub keeps what it downloads."""
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE)
    return f"here {_room(Path.cwd())}; for weights, in {cache}, {_room(cache)}"


def _room(folder: Path) -> str:
    existing = next(part for part in (folder.absolute(), *folder.absolute().parents) if part.exists())
    writable = "" if os.access(existing, os.W_OK) else ", not yours to write to"
    return f"{shutil.disk_usage(existing).free / 2**30:.1f} GiB free{writable}"


def hub(seconds: float) -> str:
    """Whether weights can be downloaded."""
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        return "not asked, for HF_HUB_OFFLINE is set; weights come from the cache or from folders"
    token = "with a token" if get_token() else "without a token (gated models want one: hf auth login)"
    answer = reach(constants.ENDPOINT, seconds)
    return f"{constants.ENDPOINT} {answer}, {token}"


def reach(address: str, seconds: float) -> str:
    """What comes of asking an address, in words, after so many seconds at most, names and all."""
    found: list[str] = []

    def ask() -> None:
        began = time.monotonic()
        try:
            with urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=2 * seconds):
                pass
        except urllib.error.HTTPError as error:
            found.append(f"answers with an error ({error.code})")
        except (OSError, ValueError, HTTPException) as error:
            found.append(f"is out of reach ({getattr(error, 'reason', error)}); folders and the cache serve")
        else:
            found.append(f"answers in {time.monotonic() - began:.1f} s")

    asking = threading.Thread(target=ask, daemon=True)  # looking up a name knows no time limit
    asking.start()
    asking.join(seconds)
    return found[0] if found else f"does not answer within {seconds:g} s; folders and the cache serve"


def missing() -> list[str]:
    """A line for each feature that lacks something here."""
    gpu = importable("torch") and _has_gpu()
    lacking = [(each, each.missing()) for each in FEATURES if gpu or not each.gpu]
    lacking = [(each, absent) for each, absent in lacking if absent]
    width = max((len(each.name) for each, _ in lacking), default=0)
    return [f"  {each.name:<{width}}  {each.line}  ({', '.join(absent)})" for each, absent in lacking]


def _has_gpu() -> bool:
    try:
        import torch

        return torch.cuda.is_available()
    except DAMAGED:  # another line has said so
        return False


def _run(arguments: Sequence[str] | None) -> int:
    parser = Parser(prog="tempflow doctor", description=__doc__, example="tempflow doctor --seconds 1")
    parser.add_argument("--seconds", type=float, default=3.0, help="to wait for the hub (default: %(default)s)")
    given = parser.parse_args(arguments)
    if not 0 < given.seconds <= MOST:
        raise BadInput("--seconds", given.seconds, f"must be above 0, at most {MOST:g}")
    looks: dict[str, Callable[[], str]] = {
        "versions": versions, "machine": processors, "operators": operators, "attention": attention, "disk": disk,
        "hub": lambda: hub(given.seconds),
    }  # fmt: skip
    broken = [name for name, look in looks.items() if not _tell(name, look)]
    lines = missing()
    print("\n".join(["missing   nothing of any feature" if not lines else "missing for", *lines]))
    print(f"broken: {', '.join(broken)}" if broken else "training works here: tempflow train")
    return 1 if broken else 0


def _tell(name: str, look: Callable[[], str]) -> bool:
    """Prints what one look found; whether it is in order."""
    try:
        print(f"{name:<9} {look()}")
    except Broken as problem:
        print(f"{name:<9} broken: {problem}")
        return False
    except DAMAGED as error:
        print(f"{name:<9} broken: {type(error).__name__} {error}")
        return False
    return True


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code: 0, 1 where something needed is broken, 2 for wrong input."""
    return end(lambda: _run(arguments))


if __name__ == "__main__":
    sys.exit(main())
