"""What a run found, from its store: the held-out comparison, the origins, and an honest sentence."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, final

from llmevo import genome as genomes
from llmevo.genome import Genome
from llmevo.report import verdict
from llmevo.report.words import spending
from llmevo.runner.finals import DEFAULT, difference, summarise
from llmevo.runner.observer import Row, RunSummary
from llmevo.stats import Interval
from llmevo.store import Store
from llmevo.trial import Score, State, Trial, standing, trained_share

_PACKAGES = ("llmevo", "numpy", "cmaes", "torch", "transformers", "peft", "mergekit", "lm-eval", "openai")


@final
@dataclass(frozen=True, slots=True)
class Effort:
    """What the complete trials took.

    Args:
        unit: Item-evaluations, or the tokens that candidates were trained on.
        spent: How many their scores rest on.
        without: How many it would have been without halving.
    """

    unit: Literal["items", "tokens"]
    spent: int
    without: int


@final
@dataclass(frozen=True, slots=True)
class Findings:
    """A run as its store has it, at any time of its life.

    Args:
        genome: What was searched, overrides included.
        summary: The runner's account.
        recipe: `best/recipe.yaml`, or None while there is none.
        versions: Version by package.
        weights: Of the terms of the score, by their key in `Score.items`.
        language_model: Which one proposed, if any.
        device: Where the trials ran.
        fingerprint: Of the items that the scores rest on.
        rungs: Items of the search up to and with each rung; a single number where there is no halving.
    """

    genome: Genome
    summary: RunSummary
    recipe: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    weights: Mapping[str, float] = field(default_factory=dict)
    language_model: str | None = None
    device: str = "cpu"
    fingerprint: str = ""
    rungs: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        """The run directory's name."""
        return self.summary.run_dir.resolve().name

    @property
    def trials(self) -> tuple[Trial, ...]:
        """Every trial, by number."""
        return self.summary.trials

    @property
    def maximize(self) -> bool:
        """The direction."""
        return self.genome.search.direction == "maximize"

    @property
    def winner(self) -> Row | None:
        """The evolved model's row on the held-out items."""
        return next((row for row in self.summary.table if row.label == "evolved"), None)

    @property
    def rival(self) -> Row | None:
        """The row that the differences are to: the best parent, or what the default settings trained."""
        rivals = [
            row for row in self.summary.table if row.label.startswith(("parent:", DEFAULT)) and row.score
        ]
        return next((row for row in rivals if row.interval is None), None)

    @property
    def rival_name(self) -> str:
        """What the rival is: `best parent`, or `default` in a run that searches training settings."""
        default = any(trial.origin == DEFAULT for trial in self.summary.references)
        return DEFAULT if default else "best parent"

    def counts(self) -> dict[str, int]:
        """Number of trials by state."""
        return {str(state): sum(trial.state is state for trial in self.trials) for state in State}

    def records(self) -> set[int]:
        """Numbers of the trials that were the best of all up to then."""
        found: set[int] = set()
        best: tuple[float, float] | None = None
        for trial in self.trials:
            if trial.score is None:
                continue
            place = standing(trial.score, self.genome.search.direction)
            if best is None or place > best:
                best = place
                found.add(trial.number)
        return found

    def by_origin(self) -> dict[str, list[Trial]]:
        """Trials by origin, in the order in which the origins first appear."""
        groups: dict[str, list[Trial]] = {}
        for trial in self.trials:
            groups.setdefault(trial.origin, []).append(trial)
        return groups

    def reference_lines(self) -> list[tuple[str, float]]:
        """The baseline, the best parent and the uniform merge, with what they scored in the search."""
        known = {trial.origin: trial.value for trial in self.summary.references if trial.value is not None}
        parents = {origin: value for origin, value in known.items() if origin.startswith("parent:")}
        lines: list[tuple[str, float]] = [
            (origin, known[origin]) for origin in ("baseline", "uniform") if origin in known
        ]
        if parents:
            pick = max if self.maximize else min
            name = pick(parents, key=lambda origin: parents[origin])
            lines.append((name, parents[name]))
        return lines

    def task_means(self, split: str) -> dict[str, dict[str, float]]:
        """Each model's mean over each task's items.

        Args:
            split: `held-out` for the models that were scored there, `search` for every reference and the
                evolved model.
        """
        rows: list[tuple[str, Score | None]] = [(row.label, row.score) for row in self.summary.table]
        if split == "search":
            evolved = [("evolved", self.summary.evolved.score)] if self.summary.evolved else []
            rows = [*((trial.origin, trial.score) for trial in self.summary.references), *evolved]
        means = {
            label: {task: sum(items) / len(items) for task, items in score.items.items() if items}
            for label, score in rows
            if score is not None
        }
        return {label: by_task for label, by_task in means.items() if by_task}

    def held_out_items(self) -> int:
        """How many items were held out."""
        row = self.winner
        return (
            0 if row is None or row.score is None else sum(len(items) for items in row.score.items.values())
        )

    def headline(self) -> str:
        """A few words on what came out."""
        return verdict.headline(self)

    def verdict(self) -> str:
        """Whether the gain is larger than the noise, and whose it is, in sentences that claim no more."""
        return verdict.verdict(self)

    def notes(self) -> list[str]:
        """What a reader of the scores should know besides; a sentence each."""
        return verdict.notes(self)

    def money(self) -> str:
        """What the language model took; empty if none was asked."""
        return "" if self.summary.money is None else spending(self.summary.money)

    def gap_to(self, kind: str) -> Interval | None:
        """How far the evolved model is from the `uniform` merge or the `warm_start` on the held-out items."""
        row, table = self.winner, self.summary.table
        other = next((other for other in table if other.label.split(":")[0] == kind), None)
        return None if row is None or other is None else difference(row, other, self.weights)

    def effort(self) -> Effort | None:
        """What halving saved; None where every trial answers all items, or is trained to its end."""
        if self.genome.train is not None:
            return self._training()
        if len(self.rungs) < 2:
            return None
        scores = [trial.score for trial in self.trials if trial.score is not None]
        rungs = [len(self.rungs) - 1 if score.rung is None else score.rung for score in scores]
        return Effort("items", sum(self.rungs[rung] for rung in rungs), len(scores) * self.rungs[-1])

    def _training(self) -> Effort | None:
        """What rungs of a training saved."""
        trained = [trial for trial in self.trials if trained_share(trial) is not None]
        if all(trial.score is None or trial.score.rung is None for trial in trained):
            return None
        spent, whole = (
            sum(int(trial.metrics["train"][key]) for trial in trained) for key in ("tokens", "budget")
        )
        return Effort("tokens", spent, whole)

    def genome_text(self) -> str:
        """The genome as it was run, overrides included, as YAML."""
        return genomes.dump(self.genome)

    def to_json(self) -> dict[str, Any]:
        """The findings as one JSON object, without per-item scores."""
        summary = self.summary
        return {
            "run_dir": str(summary.run_dir),
            "reason": summary.reason,
            "exit_code": summary.exit_code,
            "resumable": summary.resumable,
            "headline": self.headline(),
            "verdict": self.verdict(),
            "direction": self.genome.search.direction,
            "proposer": self.genome.search.proposer,
            "seed": self.genome.search.seed,
            "budget": self.genome.search.trials,
            "trials": self.counts(),
            "origins": summary.origins,
            "seconds": summary.seconds,
            "best": trial_json(summary.best),
            "evolved": trial_json(summary.evolved),
            "references": [trial_json(trial) for trial in summary.references],
            "rungs": list(self.rungs),
            "effort": None if (effort := self.effort()) is None else asdict(effort),
            "notes": self.notes(),
            "held_out": [_row_json(row) for row in summary.table],
            "uniform_gap": _interval_json(self.gap_to("uniform")),
            "warm_start_gap": _interval_json(self.gap_to("warm_start")),
            "held_out_items": self.held_out_items(),
            "language_model": self.language_model,
            "llm": None if summary.money is None else summary.money.to_json(),
            "llm_intended": summary.intended,
            "llm_proposed": summary.proposed,
            "llm_share": summary.llm_share,
            "versions": dict(self.versions),
        }


def trial_json(trial: Trial | None) -> dict[str, Any] | None:
    """A trial without its per-item scores, which would drown the rest."""
    if trial is None:
        return None
    score = None
    if trial.score is not None:
        score = {key: value for key, value in trial.score.to_json().items() if key != "items"}
        score["count"] = trial.score.count
    return {**trial.to_json(), "score": score}


def _row_json(row: Row) -> dict[str, Any]:
    return {
        "label": row.label,
        "trial": row.trial.number,
        "score": None if row.score is None else row.score.value,
        "stderr": None if row.score is None else row.score.stderr,
        "difference": _interval_json(row.interval),
        "p_value": row.p_value,
        "optimism": row.optimism,
        "seeds": row.seeds,
        "seed_deviation": None if row.spread is None else row.spread.deviation,
        "error": row.error,
    }


def _interval_json(interval: Interval | None) -> dict[str, float] | None:
    if interval is None:
        return None
    return {
        "estimate": interval.estimate,
        "low": interval.low,
        "high": interval.high,
        "level": interval.level,
    }


def versions(names: Sequence[str] = _PACKAGES) -> dict[str, str]:
    """Installed version by package, Python's own included; read from metadata, nothing is imported."""
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def load(run_dir: Path, summary: RunSummary | None = None) -> Findings:
    """The findings of the run in a directory; also while a process drives it.

    Args:
        run_dir: Where the run lies.
        summary: The account that `runner.run` gave, if it just ended.

    Raises:
        StoreError: There is no run, or it cannot be read.
    """
    recipe = run_dir / "best" / "recipe.yaml"
    with Store.open(run_dir, readonly=True) as store:
        started = [event for event in store.events if event["kind"] == "started"]
        known = {"python": started[-1]["python"], **started[-1]["packages"]} if started else {}
        return Findings(
            genome=store.genome,
            summary=summary or summarise(store),
            recipe=recipe.read_text(encoding="utf-8") if recipe.exists() else None,
            versions=known or versions(),
            weights=store.meta("pipeline", {}).get("weights", {}),
            language_model=store.meta("llm"),
            device=store.meta("pipeline", {}).get("device", "cpu"),
            fingerprint=store.meta("pipeline", {}).get("fingerprint", ""),
            rungs=tuple(sum(rung.values()) for rung in store.meta("pipeline", {}).get("rungs", ())),
        )
