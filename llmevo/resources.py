"""Text files that ship beside the code: prompts and example genomes."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Literal

from llmevo.errors import LlmevoError


def read(kind: Literal["prompts", "genomes"], name: str) -> str:
    """Text of the file `name` of one kind.

    A wheel carries them as `llmevo/_prompts` and `llmevo/_genomes`; an editable checkout has them beside the
    package.

    Args:
        kind: `prompts` or `genomes`.
        name: File name inside that folder, for instance `propose.md`; no `..`.

    Raises:
        LlmevoError: There is no such file.
    """
    if ".." in Path(name).parts or Path(name).is_absolute():
        raise LlmevoError(f"`name` must stay inside {kind}/, but got {name!r}.")
    package = files("llmevo")
    for root in (package / f"_{kind}", Path(str(package)).parent / kind):
        path = root / name
        if path.is_file():
            return path.read_text(encoding="utf-8")
    raise LlmevoError(f"`name` must be a file of {kind}/, but {name!r} is not there; reinstall llmevo.")
