"""Freed blocks are kept: seen by the page faults of a process that frees and asks again."""

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
from llmevo.executors.heap import keep_freed_blocks
if sys.argv[1] == "kept":
    assert keep_freed_blocks()
block = int(sys.argv[2])
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    bytearray(b"x") * block  # written to, so that its pages are needed
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str, size: int) -> int:
    done = subprocess.run(
        [sys.executable, "-c", FAULTS, how, str(size)], capture_output=True, text=True, check=True
    )
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has the settings")
def test_a_freed_block_serves_the_next_of_its_size() -> None:
    pages = (8 << 20) // 4096
    # glibc learns from a block's first release up to 32 MB, so the block must be above that.
    size = 40 << 20
    assert faults("plain", size) > 15 * 5 * pages
    assert faults("kept", size) < 3 * 5 * pages
