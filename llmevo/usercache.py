"""The folder where a user's caches lie, shared by all runs."""

from __future__ import annotations

import os
from pathlib import Path


def folder() -> Path | None:
    """Return `$LLMEVO_CACHE`, by default `~/.cache/llmevo`; it need not exist.

    Returns:
        None where `$LLMEVO_CACHE` is `off`, `0` or empty, or the user has no home.
    """
    text = os.environ.get("LLMEVO_CACHE", "~/.cache/llmevo")
    if text.strip().lower() in ("", "0", "off"):
        return None
    try:
        return Path(text).expanduser()
    except RuntimeError:  # a container's nameless user
        return None
