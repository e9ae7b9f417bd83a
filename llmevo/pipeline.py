"""merge -> train -> evaluate, for one trial: plain data in, plain data out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeAlias, final

from llmevo.space import Params
from llmevo.trial import Score

Split: TypeAlias = Literal["search", "holdout"]


@final
@dataclass(frozen=True, slots=True)
class Job:
    """One trial to run.

    Args:
        number: The trial's number.
        params: A value for every gene; empty if `recipe` is given.
        seed: Everything random in the stages follows from it (DARE masks, say).
        split: Which of the run's items to score.
        recipe: A mergekit configuration to evaluate instead of the params' own, for parents, the uniform
            merge and warm starts.
    """

    number: int
    params: Params
    seed: int
    split: Split = "search"
    recipe: dict[str, Any] | None = None


@final
@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a job.

    Args:
        number: The trial's number.
        score: The fitness with the per-item scores of each task's metric; None if the job failed.
        metrics: Every metric by task, for people: `{task: {metric: value}}`.
        seconds: Wall time by stage (`merge`, `train`, `evaluate`).
        bytes: Bytes by stage, where a stage counts them.
        error: One line saying why the job failed.
        stage: The stage that failed.
    """

    number: int
    score: Score | None = None
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    bytes: dict[str, int] = field(default_factory=dict)
    error: str | None = None
    stage: str | None = None


class Pipeline(Protocol):
    """Runs jobs; everything that does not depend on the trial is loaded when it is made."""

    def run(self, job: Job) -> Outcome:
        """Merge, train and evaluate; a failure is an Outcome with `error`, never an exception."""
        ...

    def describe(self) -> dict[str, Any]:
        """Facts about what was loaded, for the run's record: items by task and split, device, dtype."""
        ...
