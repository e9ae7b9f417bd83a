"""Results on stdout."""

from __future__ import annotations

import json
import sys
from typing import Any


def say(text: str) -> None:
    """Print a result."""
    sys.stdout.write(text.rstrip("\n") + "\n")
    sys.stdout.flush()


def say_json(data: Any) -> None:
    """Print one JSON document."""
    say(json.dumps(data, indent=2, ensure_ascii=False))
