"""What a piece of work took: wall time, and the peak of memory on the host and on the GPU."""

from __future__ import annotations

import resource
import sys
import time
from contextlib import suppress
from pathlib import Path

import torch

_PROC = Path("/proc/self")


class Footprint:
    """Counts from its construction on, which sets both peaks back to what is in use at that moment.

    Where the system cannot set the host's peak back (all but Linux), it is that of the whole process.
    """

    def __init__(self) -> None:
        self.started = time.monotonic()
        with suppress(OSError):
            (_PROC / "clear_refs").write_text("5")
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    @property
    def seconds(self) -> float:
        """Wall time so far."""
        return time.monotonic() - self.started

    def numbers(self) -> dict[str, float]:
        """seconds, peak_host_bytes (resident), and with a GPU peak_gpu_bytes (allocated by torch)."""
        found = {"seconds": self.seconds, "peak_host_bytes": float(_peak_host_bytes())}
        if torch.cuda.is_available():
            found["peak_gpu_bytes"] = float(torch.cuda.max_memory_allocated())
        return found


def _peak_host_bytes() -> int:
    with suppress(OSError, StopIteration):
        lines = (_PROC / "status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
