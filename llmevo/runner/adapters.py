"""The trained adapters of a run: which of them are kept on the disk, and the best one's folder."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

from llmevo.errors import StoreError
from llmevo.pipeline import ADAPTERS, adapter_folder
from llmevo.trial import Direction, State, Trial, ranked

BEST = Path("best") / "adapter"


def folder_of(run_dir: Path, number: int) -> Path:
    """Where a trial's adapter is, if it is kept."""
    return run_dir / ADAPTERS / adapter_folder(number)


def prune(
    run_dir: Path,
    trials: Sequence[Trial],
    references: int,
    direction: Direction,
    finalists: int,
    parents: Iterable[Trial] = (),
) -> None:
    """Delete the adapters of trials that are over and can be neither finalists nor parents any more.

    Args:
        run_dir: The run directory.
        trials: The whole run, by number.
        references: How many of the first trials no proposer made; theirs are kept.
        direction: Of the search's score.
        finalists: How many of the proposers' best trials may still be scored on the held-out items.
        parents: Trials whose children may begin with their adapters.
    """
    best = {trial.number for trial in [*ranked(trials[references:], direction)[:finalists], *parents]}
    over = (t.number for t in trials[references:] if t.state is not State.PENDING and t.number not in best)
    _remove(run_dir, over)
    # What a training that was interrupted left behind is of use to its own trial only.
    pending = {adapter_folder(trial.number) for trial in trials if trial.state is State.PENDING}
    for state in (run_dir / ADAPTERS).glob("trial*.safetensors"):
        if state.name.split(".")[0] not in pending:
            state.unlink(missing_ok=True)


def prune_reruns(run_dir: Path) -> None:
    """Delete the adapters of re-runs, which are of no use once they are scored on the held-out items."""
    for folder in (run_dir / ADAPTERS).glob("trial*-rerun*"):
        shutil.rmtree(folder, ignore_errors=True)


def _remove(run_dir: Path, numbers: Iterable[int]) -> None:
    for number in numbers:
        shutil.rmtree(folder_of(run_dir, number), ignore_errors=True)


def publish(run_dir: Path, number: int, base: str | None) -> None:
    """Make `best/adapter` that of a trial, or remove it where the trial has none.

    Args:
        run_dir: The run directory.
        number: The trial.
        base: The model that the adapter belongs on, as a user names it; None for a merge, whose recipe lies
            beside it.

    Raises:
        StoreError: The disk does not serve.
    """
    source, target = folder_of(run_dir, number), run_dir / BEST
    beside, old = (target.with_name(f".{target.name}.{kind}") for kind in ("new", "old"))
    try:
        for folder in (beside, old):
            shutil.rmtree(folder, ignore_errors=True)
        if source.is_dir():
            shutil.copytree(source, beside)
            _name_base(beside / "adapter_config.json", base)
        if target.is_dir():
            os.rename(target, old)  # a folder that is not empty cannot be replaced
        if beside.is_dir():
            os.rename(beside, target)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise StoreError(f"`{target}` cannot be written: {error}.") from error


def _name_base(path: Path, base: str | None) -> None:
    config = json.loads(path.read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = base
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
