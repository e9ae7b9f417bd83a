"""What a candidate scores: lm-eval's tasks, the loss on examples that were not trained on, or both."""

from __future__ import annotations

import hashlib
import math
from typing import TYPE_CHECKING, Any, final

from llmevo.genome import NLL, VALIDATION_LOSS, Genome
from llmevo.trial import Score, Split, standard_error

if TYPE_CHECKING:
    from llmevo.evaluate import Evaluator
    from llmevo.train import Trainer


@final
class Fitness:
    """Scores whatever the resident model is, with or without an adapter on it.

    Args:
        genome: The tasks, and the direction of the search.
        evaluator: Of the tasks that are lm-eval's; None if there are none.
        trainer: Has the examples of `validation_loss`; None if nothing is trained.

    Attributes:
        last: How many of lm-eval's items the last evaluation `scored`, and how many it had `cached`.
    """

    def __init__(self, genome: Genome, evaluator: Evaluator | None, trainer: Trainer | None) -> None:
        from llmevo.evaluate.measures import sign

        self._evaluator, self._trainer = evaluator, trainer
        self._direction = genome.search.direction
        self.last: dict[str, int] = {}
        own = next((task for task in genome.tasks if task.name == VALIDATION_LOSS), None)
        self._weight = None if own is None else abs(own.weight)
        self._sign = sign(1.0 if own is None else own.weight, False, self._direction)

    def evaluate(
        self, split: Split, *, rung: int | None = None, weights: str | None = None
    ) -> tuple[Score, dict[str, dict[str, float]]]:
        """Score the resident model; see `Evaluator.evaluate`.

        The loss is that of the validation examples for the search, and of the test examples for the holdout.
        On a rung of a search that trains it is the whole score, whatever the tasks are: it says early which
        training is the better one, and the accuracy on a few items does not.
        """
        self.last = {}
        score: Score | None = None
        metrics: dict[str, dict[str, float]] = {}
        alone = self._trainer is not None and rung is not None
        if self._evaluator is not None and not alone:
            score, metrics = self._evaluator.evaluate(split, rung=rung, weights=weights)
            self.last = dict(self._evaluator.last)
        if self._trainer is None or (self._weight is None and not alone):
            assert score is not None
            return score, metrics
        losses = self._trainer.losses("validation" if split == "search" else "test")
        mean = math.fsum(losses) / len(losses)
        metrics = {**metrics, VALIDATION_LOSS: {NLL: mean}}
        # Less is better in either direction, and items are signed so that more is.
        items = {VALIDATION_LOSS: [-loss for loss in losses]}
        error, weight = standard_error(losses), 1.0 if self._weight is None else self._weight
        value = self._sign * weight * mean
        squared = None if error is None else (weight * error) ** 2
        if score is not None:
            value += score.value
            items = {**{task: list(values) for task, values in score.items.items()}, **items}
            unknown = squared is None or score.stderr is None
            squared = None if unknown else squared + score.stderr**2  # type: ignore[operator]
        return Score(value, None if squared is None else math.sqrt(squared), items), metrics

    def known(self, split: Split, rung: int | None, weights: str) -> bool:
        """Whether `evaluate` with these arguments needs no model; see `Evaluator.known`."""
        if self._evaluator is None or self._weight is not None:  # losses are not kept
            return False
        return self._evaluator.known(split, rung, weights)

    def describe(self) -> dict[str, Any]:
        """`Evaluator.describe()` with the loss among its facts, and `train` and `shares`: the trainer's."""
        facts: dict[str, Any] = {"items": {}, "weights": {}, "signs": {}, "fingerprint": ""}
        if self._evaluator is not None:
            facts = self._evaluator.describe()
        if self._trainer is None:
            return facts
        facts["train"] = self._trainer.describe()
        facts["shares"] = list(self._trainer.shares)
        known = facts["train"]["fingerprint"]
        facts["fingerprint"] = hashlib.sha256(f"{facts['fingerprint']} {known}".encode()).hexdigest()
        if self._weight is not None:
            counts = facts["train"]["examples"]
            facts["items"][VALIDATION_LOSS] = {"search": counts["validation"], "holdout": counts["test"]}
            facts["weights"][VALIDATION_LOSS] = self._weight
            facts["signs"][VALIDATION_LOSS] = self._sign
        return facts
