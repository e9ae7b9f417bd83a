"""What a run found, from its store: the held-out comparison, the origins, and an honest sentence."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, final

from llmevo import genome as genomes
from llmevo.errors import StatsError
from llmevo.genome import Genome
from llmevo.llm.ledger import Totals
from llmevo.runner.finals import summarise
from llmevo.runner.observer import Row, RunSummary
from llmevo.stats import Interval, paired_difference
from llmevo.store import Store
from llmevo.trial import Score, State, Trial

_Z95 = 1.959964
LLM_RUN = 0.8  # a run whose intended LLM proposals are the model's own to a lesser share is not called one
_PACKAGES = ("llmevo", "numpy", "cmaes", "torch", "transformers", "peft", "mergekit", "lm-eval", "openai")


def number(value: float) -> str:
    """A score for a person: four decimals, or four digits where it is large or tiny."""
    text = f"{value:.4f}" if 1e-3 <= abs(value) < 1e3 or value == 0 else f"{value:.4g}"
    return text.replace("-", "\N{MINUS SIGN}")


def signed(value: float) -> str:
    """A difference for a person, always with its sign."""
    return number(value) if value < 0 else f"+{number(value)}"


def interval(score: Score) -> tuple[float, float] | None:
    """The 95 % interval of a score by its standard error, or None if that is unknown."""
    if score.stderr is None:
        return None
    return score.value - _Z95 * score.stderr, score.value + _Z95 * score.stderr


def duration(seconds: float) -> str:
    """Seconds for a person: `8.2 s`, `3 min 05 s`, `2 h 10 min`."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def percent(level: float) -> str:
    """A confidence level for a person: `95 %`."""
    return f"{100 * level:.3g} %"


def spending(money: Totals) -> str:
    """Calls, tokens and dollars for a person; what is unknown is called that."""

    def count(tokens: int | None) -> str:
        return "unknown" if tokens is None else str(tokens)

    requests = f"{money.requests} request" + "s" * (money.requests != 1)
    parts = [
        f"{money.calls} call" + "s" * (money.calls != 1) + f" ({requests}, {money.answered} answered)",
        f"tokens: {count(money.prompt)} prompt (cached {count(money.cached)}), "
        f"{count(money.completion)} completion (reasoning {count(money.reasoning)})",
        "dollars unknown" if money.usd is None else f"${money.usd:.4f}",
    ]
    if money.unsettled:
        most = "an unknown sum" if money.held_usd is None else f"${money.held_usd:.4f}"
        parts.append(f"at most {most} more for {money.unsettled} without an answer")
    return "; ".join(parts)


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
    """

    genome: Genome
    summary: RunSummary
    recipe: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    weights: Mapping[str, float] = field(default_factory=dict)
    language_model: str | None = None
    device: str = "cpu"

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
    def best_parent(self) -> Row | None:
        """The row that the differences are to: the only parent without a difference to it."""
        parents = [row for row in self.summary.table if row.label.startswith("parent:") and row.score]
        return next((row for row in parents if row.interval is None), None)

    def counts(self) -> dict[str, int]:
        """Number of trials by state."""
        return {str(state): sum(trial.state is state for trial in self.trials) for state in State}

    def better(self, a: float, b: float) -> bool:
        """Whether `a` is better than `b` in the run's direction."""
        return a > b if self.maximize else a < b

    def records(self) -> set[int]:
        """Numbers of the trials that were the best of all up to then."""
        found: set[int] = set()
        best: float | None = None
        for trial in self.trials:
            if trial.value is not None and (best is None or self.better(trial.value, best)):
                best = trial.value
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
        if self.summary.best is None:
            return "No trial was completed"
        row = self.winner
        if row is None or row.score is None:
            return f"Best so far: {number(self.summary.best.score.value)}" if self.summary.best.score else ""
        if row.interval is None:
            return f"The evolved model scores {number(row.score.value)} on held-out items"
        if self._sure(row.interval.low, row.interval.high) > 0:
            return f"The evolved merge beats the best parent by {number(abs(row.interval.estimate))}"
        if self._sure(row.interval.low, row.interval.high) < 0:
            return f"The evolved merge is worse than the best parent by {number(abs(row.interval.estimate))}"
        return "No gain over the best parent that is larger than the noise"

    def _sure(self, low: float, high: float) -> int:
        """1 if a difference's whole interval is an improvement, -1 if it is all a loss, else 0."""
        if low <= 0 <= high:
            return 0
        return 1 if self.better(low, 0.0) else -1

    def verdict(self) -> str:
        """Whether the gain is larger than the noise, and whose it is, in sentences that claim no more."""
        return " ".join(part for part in (self._gain(), self.not_an_llm_run()) if part)

    def not_an_llm_run(self) -> str:
        """Why this is no run of a language model, where too few of its proposals are its own; else empty."""
        summary = self.summary
        if summary.llm_share is None or summary.llm_share >= LLM_RUN:
            return ""
        return (
            f"This is not an LLM run: of {summary.intended} trials that the language model was to propose, "
            f"{summary.proposed} ({percent(summary.llm_share)}) are its own."
        )

    def money(self) -> str:
        """What the language model took; empty if none was asked."""
        return "" if self.summary.money is None else spending(self.summary.money)

    def _gain(self) -> str:
        row = self.winner
        if self.summary.best is None:
            return "Every trial so far has failed or is still to come; see the reasons below."
        if row is None or row.score is None:
            why = f" ({row.error})" if row is not None and row.error else ""
            return (
                f"The held-out items have not been scored{why}, so nothing can be said yet about a gain: the "
                "best of many noisy scores is too good on average."
            )
        unsearched = [
            self._against("uniform", "uniform merge"),
            self._against("warm_start", "best warm start"),
        ]
        parts = (self._against_parent(row), self._claimed(row), *unsearched)
        return " ".join(part for part in parts if part)

    def _claimed(self, row: Row) -> str:
        """What the gain had looked like on the items that chose the winner."""
        parent = self.best_parent
        if parent is None or parent.trial.value is None or row.trial.value is None or row.interval is None:
            return ""
        gap = signed(row.trial.value - parent.trial.value)
        return f"On the search items, which chose it, the difference had been {gap}."

    def _against_parent(self, row: Row) -> str:
        parent, gap = self.best_parent, row.interval
        if gap is None or parent is None:
            return "There is no parent's held-out score to compare the evolved model with."
        span = (
            f"{signed(gap.estimate)} on {self.held_out_items()} held-out items "
            f"({percent(gap.level)} interval {signed(gap.low)} to {signed(gap.high)})"
        )
        name = parent.label.removeprefix("parent:")
        sure = self._sure(gap.low, gap.high)
        if sure > 0:
            return f"Against the best parent, {name}, the evolved merge gains {span}: more than the noise."
        if sure < 0:
            return (
                f"Against the best parent, {name}, the evolved merge loses {span}: worse, beyond the noise."
            )
        return (
            f"Against the best parent, {name}, the evolved merge differs by {span}. The interval includes "
            "zero: no gain larger than the noise is shown. More held-out items would narrow it."
        )

    def gap_to(self, kind: str) -> Interval | None:
        """How far the evolved model is from the `uniform` merge or the `warm_start` on the held-out items."""
        row = self.winner
        table = self.summary.table
        other = next((other.score for other in table if other.label.split(":")[0] == kind), None)
        if row is None or row.score is None or other is None:
            return None
        try:
            return paired_difference(row.score.items, other.items, weights=self.weights)
        except StatsError:  # scores without items have no pairs
            return None

    def _against(self, kind: str, name: str) -> str:
        """What the search gained over a recipe that needs none."""
        gap = self.gap_to(kind)
        if gap is None:
            return ""
        span = (
            f"{signed(gap.estimate)} ({percent(gap.level)} interval {signed(gap.low)} to {signed(gap.high)})"
        )
        sure = self._sure(gap.low, gap.high)
        if sure > 0:
            return f"Against the {name} it gains {span}."
        if sure < 0:
            return f"The {name}, which needs no search, is better: the evolved one differs by {span}."
        return f"The {name}, which needs no search, cannot be told apart: the difference is {span}."

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
    score = None if trial.score is None else {"value": trial.score.value, "stderr": trial.score.stderr}
    return {**trial.to_json(), "score": score}


def _row_json(row: Row) -> dict[str, Any]:
    return {
        "label": row.label,
        "trial": row.trial.number,
        "score": None if row.score is None else row.score.value,
        "stderr": None if row.score is None else row.score.stderr,
        "difference": _interval_json(row.interval),
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
        )
