"""`llmevo replay`: the proof that a run is what its records say."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from llmevo.cli.options import Json, RunPath, Verbose
from llmevo.cli.output import say, say_json


def replay(
    run_path: RunPath,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Keep the second run there.")
    ] = None,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Play a run again from its records, without a network, and compare every trial."""
    from llmevo.cli.display import NoDisplay
    from llmevo.runner.replay import replay as play

    with tempfile.TemporaryDirectory(prefix="llmevo-replay-") as folder:
        found = play(run_path, out or Path(folder) / "run", NoDisplay())
    if as_json:
        say_json(found.to_json())
    else:
        say("\n".join([*found.differences, found.describe()]))
    raise typer.Exit(0 if found.identical else 1)
