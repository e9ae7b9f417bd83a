"""The most memory that a piece of work takes beyond what was there before it."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, final

if TYPE_CHECKING:
    import torch

CUDA = "peak of CUDA's allocations"
RSS = "growth of the resident set at its peak"
_PROC = Path("/proc/self")


@final
class Peak:
    """What `peak` finds.

    Attributes:
        bytes: None where nothing counts them.
    """

    def __init__(self) -> None:
        self.bytes: int | None = None


@contextmanager
def peak(device: torch.device) -> Iterator[Peak]:
    """Count in the `with` block; what was freed before is given back to the system first."""
    import torch

    found = Peak()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield found
        found.bytes = torch.cuda.max_memory_allocated(device) - before
        return
    known = _restart()
    yield found
    if known is not None:
        found.bytes = max(_status("VmHWM") - known, 0)


def source(device: torch.device) -> str:
    """What `peak` counts on a device."""
    return CUDA if device.type == "cuda" else RSS


def _restart() -> int | None:
    """Let the kernel forget the peak so far; the resident set now, or None where there is no such kernel."""
    try:
        ctypes.CDLL(None).malloc_trim(0)  # else the next one would use what the last one left, unseen
        (_PROC / "clear_refs").write_text("5")
        return _status("VmRSS")
    except (OSError, AttributeError):
        return None


def _status(key: str) -> int:
    """A size of this process, in bytes."""
    lines = (_PROC / "status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(f"{key}:")))
