"""`llmevo merge-adapters`: the weighted sum of LoRAs of one model, as one LoRA."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Annotated

import typer

from llmevo.cli.options import Json, Verbose
from llmevo.cli.output import say, say_json


def merge_adapters(
    folders: Annotated[
        list[Path],
        typer.Argument(metavar="ADAPTER...", help="Folders of LoRAs of one model.", show_default=False),
    ],
    weights: Annotated[
        list[float], typer.Option("--weight", metavar="W", help="One for each adapter, in their order.")
    ],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="A new folder.")],
    rank: Annotated[
        int | None,
        typer.Option("--rank", min=1, help="Cut the sum to this rank; without it the sum is exact."),
    ] = None,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Sum LoRAs: the model with the sum is the merge of the models with each."""
    from llmevo.train.combine import combine

    found = combine(folders, weights, out, rank=rank)
    lost = math.fsum(found.lost.values()) / len(found.lost)
    facts = {"out": str(out), "modules": len(found.ranks), "rank": max(found.ranks.values()), "lost": lost}
    if as_json:
        say_json(facts)
        return
    say(str(out))
    cut = f"{lost:.1%} of its norm was cut off in a module, on average" if lost else "the sum is exact"
    print(f"{facts['modules']} modules of rank {facts['rank']} or less; {cut}", file=sys.stderr)
