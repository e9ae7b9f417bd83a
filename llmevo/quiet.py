"""Keep from the user what other packages say and he can do nothing about."""

from __future__ import annotations

import logging


def bitsandbytes() -> None:
    """Keep back that bitsandbytes would like another package.

    peft imports it where it is installed, for any LoRA, and mergekit imports peft.
    """
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
