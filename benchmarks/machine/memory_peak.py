"""Peak memory of a piece of work above what was held before it."""

from __future__ import annotations

from pathlib import Path

import torch

GIB = 2**30


class MemoryPeak:
    """Starts counting when made. On a CPU it is the process's resident memory, as Linux counts it."""

    def __init__(self, device: torch.device):
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.before = torch.cuda.memory_allocated(device)
        else:
            self.before = self._reset()

    def gib(self) -> float | None:
        """GiB, or None where it cannot be told."""
        if self.device.type == "cuda":
            return (torch.cuda.max_memory_allocated(self.device) - self.before) / GIB
        return None if self.before is None else (self._status("VmHWM") - self.before) / GIB

    def _reset(self) -> int | None:
        try:
            Path("/proc/self/clear_refs").write_text("5")
            return self._status("VmRSS")
        except OSError:
            return None

    @staticmethod
    def _status(name: str) -> int:
        """Bytes."""
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def free_cached_blocks(device: torch.device) -> None:
    """Gives the memory that torch's allocator keeps for later back to the device; on a CPU it keeps none."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
