"""How the C library gives memory back, which on a CPU decides how fast a model's small steps are."""

from __future__ import annotations

import contextlib
import ctypes
import sys

# From glibc's malloc.h.
_TRIM_THRESHOLD = -1
_MMAP_THRESHOLD = -3

LARGEST = 300 << 20
"""Bytes of the largest block that is kept: a batch's logits are (`evaluate.packed`), a model is not."""
KEPT = 1 << 30
"""Bytes at the heap's end that are kept at most."""


def keep_freed_blocks() -> bool:
    """Have this process keep what it frees, for the next block of the kind.

    A forward pass makes and frees some megabytes at each of its steps. glibc asks the kernel for every such
    block and gives it back, and the kernel fills each page with zeros on first touch: that was a tenth of an
    evaluation. Blocks above `LARGEST`, whole models above all, still go back at once.

    Returns:
        Whether the C library took it; others than glibc have no such settings, and nothing changes there.
    """
    if not sys.platform.startswith("linux"):
        return False
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        return bool(mallopt(_MMAP_THRESHOLD, LARGEST) and mallopt(_TRIM_THRESHOLD, KEPT))
    return False
