"""The trained half of a trial: its settings, where its adapter is, and the settings to copy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llmevo.errors import LlmevoError
from llmevo.genome import TrainSettings
from llmevo.report.findings import Findings
from llmevo.runner.adapters import BEST, folder_of
from llmevo.trial import Trial


def settings_of(findings: Findings, trial: Trial) -> TrainSettings | None:
    """The hyperparameters that a trial was trained with; None if it was not."""
    spec = findings.genome.train
    return None if spec is None or "recipe" in trial.attrs else spec.settings(trial.params)


def adapter_of(findings: Findings, trial: Trial) -> Path | None:
    """The folder of a trial's adapter; None if it was not trained.

    Raises:
        LlmevoError: It was trained, but is not kept.
    """
    if settings_of(findings, trial) is None:
        return None
    run_dir, best = findings.summary.run_dir, findings.summary.best
    chosen = best is not None and best.number == trial.number
    folder = run_dir / BEST if chosen else folder_of(run_dir, trial.number)
    if not folder.is_dir():
        raise LlmevoError(
            f"`{run_dir}` does not have the adapter of trial {trial.number}: those of the best trials and of "
            "the default are kept; raise `evaluate.finalists` to keep more."
        )
    return folder


def snippets_of(findings: Findings, trial: Trial) -> dict[str, str] | None:
    """The settings to copy, `python` for peft and TRL and `axolotl` as YAML; None for an untrained trial."""
    from llmevo.cli.console import scored
    from llmevo.train.snippet import axolotl, snippet
    from llmevo.train.trainer import RECORD

    settings, spec = settings_of(findings, trial), findings.genome.train
    folder = adapter_of(findings, trial)
    if settings is None or spec is None or folder is None:
        return None
    adapter: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    record: dict[str, Any] = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    steps, chat = int(record["metrics"]["steps"]), record.get("chat", False)
    base = findings.genome.alone or f"the merge of {findings.summary.run_dir / 'best' / 'recipe.yaml'}"
    head = (
        f"# Trial {trial.number} by {trial.origin}: {scored(findings, trial)}\n"
        f"# trained on {spec.data.train}\n# from {base}\n"
    )
    longest = spec.data.max_length
    return {
        "python": f"{head}\n{snippet(settings, adapter, steps, longest, chat=chat)}",
        "axolotl": head + axolotl(settings, adapter, steps, longest),
    }
