"""Keep from the user what other packages say and he can do nothing about."""

from __future__ import annotations

import contextlib
import logging
import threading


def bitsandbytes() -> None:
    """Keep back that bitsandbytes would like another package.

    peft imports it where it is installed, for any LoRA, and mergekit imports peft. So it is called
    before all of them: where llmevo itself is imported.
    """
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def transformers() -> None:
    """Keep back transformers' bars and hints, which would stand between the lines of a command."""
    from transformers.utils import logging as theirs

    theirs.disable_progress_bar()
    theirs.set_verbosity_error()


def semaphores() -> None:
    """Keep back that a worker which was killed leaves a semaphore behind.

    It would be the lock that tqdm's progress bars share between processes, made with the first bar. A worker
    has no processes to share it with.
    """
    with contextlib.suppress(ImportError):
        from tqdm import tqdm

        tqdm.set_lock(threading.RLock())
