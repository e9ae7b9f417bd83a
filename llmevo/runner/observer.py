"""What a run tells: before it starts, while it goes on, and when it has ended."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, final

from llmevo.genome import Genome
from llmevo.llm.ledger import Totals
from llmevo.space import Space
from llmevo.stats import Interval, Spread
from llmevo.trial import Score, Trial


@final
@dataclass(frozen=True, slots=True)
class RunInfo:
    """What is known when a run starts.

    Args:
        run_dir: Where it is kept.
        genome: What is searched.
        space: The genes.
        trials: The trials of earlier sittings, pending ones included.
        references: How many of the first trials are references (baseline, parents, uniform, warm starts).
        batch: Trials per `ask`.
    """

    run_dir: Path
    genome: Genome
    space: Space
    trials: tuple[Trial, ...]
    references: int
    batch: int


@final
@dataclass(frozen=True, slots=True)
class Row:
    """A line of the table on held-out items.

    Args:
        label: `evolved`, `evolved:2`, ..., `parent:NAME`, `uniform`, `baseline`, `warm_start:I`, `default`.
        trial: The trial, with its score on the search items.
        score: On the held-out items; None if that evaluation failed.
        interval: Of the paired difference to the rival, which is the best parent, or what the default
            settings trained where they are searched; positive where this row is better whatever the
            direction; its `level` is above 0.95 where several finalists share the risk. None for the
            parent's own row, without a parent, and where a score is missing.
        error: Why the held-out evaluation failed.
        p_value: A finalist's, that it and the rival are equally good, two-sided and after Holm's
            correction over the finalists; None for the other rows and where there is no interval.
        optimism: How much better the score on the search items is than the one on the held-out items,
            positive where the search flatters whatever the direction.
        seeds: Trainings whose mean the score is; 0 where nothing was trained.
        spread: How far one training's score moves from seed to seed, over all rows; None if unknown.
    """

    label: str
    trial: Trial
    score: Score | None
    interval: Interval | None
    error: str | None = None
    p_value: float | None = None
    optimism: float | None = None
    seeds: int = 0
    spread: Spread | None = None


@final
@dataclass(frozen=True, slots=True)
class RunSummary:
    """How a run, or one sitting of it, ended.

    Args:
        run_dir: Where it is kept.
        exit_code: 0 finished; 1 no trial was completed; 3 stopped early and resumable; 130 interrupted.
        reason: One line on why it ended.
        resumable: Whether the same command would do more.
        best: The best complete trial on the search items, references included.
        evolved: The best complete trial that a proposer made.
        trials: Every trial, by number.
        references: The first trials, which no proposer made.
        table: Scores on the held-out items; empty until the run is finished.
        origins: Number of trials by origin.
        seconds: Wall time summed over all trials by phase: `propose`, `merge`, `evaluate`, `store`, ...
        elapsed: Wall time of this sitting.
        money: Calls, tokens and dollars of the language model, all sittings together; None if none was asked.
        intended: Trials that the language model was to propose.
        proposed: Of those, the ones that are its own: no stand-in's and no mutation of what it repeated.
    """

    run_dir: Path
    exit_code: int
    reason: str
    resumable: bool
    best: Trial | None
    evolved: Trial | None
    trials: tuple[Trial, ...]
    references: tuple[Trial, ...] = ()
    table: tuple[Row, ...] = ()
    origins: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    elapsed: float = 0.0
    money: Totals | None = None
    intended: int = 0
    proposed: int = 0

    @property
    def llm_share(self) -> float | None:
        """`proposed` over `intended`; None where the language model was to propose nothing."""
        return self.proposed / self.intended if self.intended else None


class Observer(Protocol):
    """Sees the run; every result it is shown is on disk. Called from the thread that called `run`."""

    def started(self, info: RunInfo) -> None:
        """The run directory is ours; no model is loaded yet."""
        ...

    def note(self, line: str) -> None:
        """One line for a person: loading, a signal, a fallback."""
        ...

    def asked(self, trials: Sequence[Trial], seconds: float) -> None:
        """A batch was proposed in `seconds`, and recorded."""
        ...

    def sifted(self, reached: str, entered: Sequence[int], kept: Sequence[int]) -> None:
        """A rung of a batch is over: after `60 items`, or what was reached, `kept` of `entered` go on."""
        ...

    def finished(self, trial: Trial, best: Trial | None) -> None:
        """A trial is complete or failed; `best` is the best so far."""
        ...

    def ended(self, summary: RunSummary) -> None:
        """Nothing more will come."""
        ...
