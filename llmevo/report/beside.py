"""Other runs beside one: what each found on the same held-out items, and what it was trained on for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, final

from llmevo.errors import LlmevoError, StatsError
from llmevo.report.findings import Findings
from llmevo.runner.facts import tokens
from llmevo.runner.finals import DEFAULT
from llmevo.runner.observer import Row
from llmevo.stats import Interval, paired_difference


@final
@dataclass(frozen=True, slots=True)
class Rival:
    """What a run came to.

    Args:
        name: The run directory's name.
        proposer: Who searched.
        trials: How many the proposer made.
        tokens: Its trials were trained on; of a run without any, the default's.
        label: Its row of the held-out table: `evolved`, or `default` where nobody searched.
        score: On the held-out items.
        tasks: The mean over each task's items; more is better.
        lead: By how much the first run is ahead, paired; None for the first itself.
    """

    name: str
    proposer: str
    trials: int
    tokens: int
    label: str
    score: float
    tasks: dict[str, float]
    lead: Interval | None

    def to_json(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


def compare(first: Findings, others: Sequence[Findings]) -> list[Rival]:
    """The runs, the first one first.

    Raises:
        LlmevoError: A run has no held-out scores, or they are of other items.
    """
    mine = _row(first)
    return [_rival(first, mine, None), *(_rival(other, _row(other), (first, mine)) for other in others)]


def _row(findings: Findings) -> Row:
    rows = {row.label: row for row in findings.summary.table if row.score is not None}
    for label in ("evolved", DEFAULT):
        if label in rows:
            return rows[label]
    raise LlmevoError(
        f"`{findings.summary.run_dir}` must have scores on the held-out items to be compared, but has "
        "none; let it finish."
    )


def _rival(findings: Findings, row: Row, first: tuple[Findings, Row] | None) -> Rival:
    assert row.score is not None
    lead = None
    if first is not None:
        other, mine = first
        assert mine.score is not None
        if findings.fingerprint != other.fingerprint or findings.weights != other.weights:
            raise LlmevoError(
                f"`{findings.summary.run_dir}` must have been scored on the items of "
                f"`{other.summary.run_dir}`, but its tasks, weights or data are others."
            )
        try:
            lead = paired_difference(mine.score.items, row.score.items, weights=findings.weights)
        except StatsError as error:
            raise LlmevoError(f"`{findings.summary.run_dir}` cannot be compared: {error}") from None
    own = findings.trials[len(findings.summary.references) :]
    return Rival(
        name=findings.name,
        proposer=findings.genome.search.proposer if own else "none",
        trials=len(own),
        tokens=tokens(own or [row.trial]),
        label=row.label,
        score=row.score.value,
        tasks={task: sum(items) / len(items) for task, items in row.score.items.items() if items},
        lead=lead,
    )
