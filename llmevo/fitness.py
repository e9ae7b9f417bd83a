"""What a candidate scores: lm-eval's tasks, the loss on examples that were not trained on, or both."""

from __future__ import annotations

import hashlib
import math
from typing import TYPE_CHECKING, Any, final

from llmevo.genome import GENERAL_LOSS, NLL, VALIDATION_LOSS, Genome
from llmevo.trial import Score, Split, standard_error

if TYPE_CHECKING:
    from llmevo.evaluate import Evaluator
    from llmevo.train import Trainer
    from llmevo.train.data import Part

_PARTS: dict[str, dict[Split, Part]] = {
    VALIDATION_LOSS: {"search": "validation", "holdout": "test"},
    GENERAL_LOSS: {"search": "general", "holdout": "general_test"},
}


@final
class Fitness:
    """Scores whatever the resident model is, with or without an adapter on it.

    Args:
        genome: The tasks, and the direction of the search.
        evaluator: Of the tasks that are lm-eval's; None if there are none.
        trainer: Has the examples of the losses; None if nothing is trained.

    Attributes:
        last: How many of lm-eval's items the last evaluation `scored`, and how many it had `cached`.
    """

    def __init__(self, genome: Genome, evaluator: Evaluator | None, trainer: Trainer | None) -> None:
        from llmevo.evaluate.measures import sign

        self._evaluator, self._trainer = evaluator, trainer
        self._direction = genome.search.direction
        self.last: dict[str, int] = {}
        own = [task for task in genome.tasks if task.name in _PARTS]
        self._weights = {task.name: abs(task.weight) for task in own}
        self._signs = {VALIDATION_LOSS: sign(1.0, False, self._direction)}
        self._signs |= {task.name: sign(task.weight, False, self._direction) for task in own}

    def evaluate(
        self, split: Split, *, rung: int | None = None, weights: str | None = None
    ) -> tuple[Score, dict[str, dict[str, float]]]:
        """Score the resident model; see `Evaluator.evaluate`.

        The losses are those of the validation and general examples for the search, and of the test and
        general test examples for the holdout. On a rung of a search that trains the validation loss is the
        whole score, whatever the tasks are: it says early which training is the better one, and the accuracy
        on a few items does not.
        """
        self.last = {}
        score: Score | None = None
        metrics: dict[str, dict[str, float]] = {}
        alone = self._trainer is not None and rung is not None
        if self._evaluator is not None and not alone:
            score, metrics = self._evaluator.evaluate(split, rung=rung, weights=weights)
            self.last = dict(self._evaluator.last)
        weighted = {VALIDATION_LOSS: self._weights.get(VALIDATION_LOSS, 1.0)} if alone else self._weights
        if self._trainer is None or not weighted:
            assert score is not None
            return score, metrics
        value, squared, items = 0.0, 0.0, {}
        if score is not None:
            value, squared = score.value, math.nan if score.stderr is None else score.stderr**2
            items = {task: list(values) for task, values in score.items.items()}
        for name, weight in weighted.items():
            losses = self._trainer.losses(_PARTS[name][split])
            mean, error = math.fsum(losses) / len(losses), standard_error(losses)
            metrics = {**metrics, name: {NLL: mean}}
            # Less is better in either direction, and items are signed so that more is.
            items[name] = [-loss for loss in losses]
            value += self._signs[name] * weight * mean
            squared += math.nan if error is None else (weight * error) ** 2
        return Score(value, None if math.isnan(squared) else math.sqrt(squared), items), metrics

    def known(self, split: Split, rung: int | None, weights: str) -> bool:
        """Whether `evaluate` with these arguments needs no model; see `Evaluator.known`."""
        if self._evaluator is None or self._weights:  # losses are not kept
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
        counts = facts["train"]["examples"]
        for name, weight in self._weights.items():
            facts["items"][name] = {split: counts[part] for split, part in _PARTS[name].items()}
            facts["weights"][name] = weight
            facts["signs"][name] = self._signs[name]
        return facts
