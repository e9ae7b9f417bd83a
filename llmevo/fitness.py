"""What a candidate scores: lm-eval's tasks, metrics on examples that were not trained on, or both."""

from __future__ import annotations

import hashlib
import math
from typing import TYPE_CHECKING, Any, final

from llmevo.genome import OWN_TASKS, VALIDATION_LOSS, Genome
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
        trainer: Measures the tasks of `OWN_TASKS` on its examples; None if nothing is trained.

    Attributes:
        last: How many of lm-eval's items the last evaluation `scored`, and how many it had `cached`.
    """

    def __init__(self, genome: Genome, evaluator: Evaluator | None, trainer: Trainer | None) -> None:
        from llmevo.evaluate.measures import sign

        self._evaluator, self._trainer = evaluator, trainer
        direction = genome.search.direction
        self.last: dict[str, int] = {}
        self._weights = {task.name: abs(task.weight) for task in genome.own_tasks}
        self._signs = {VALIDATION_LOSS: sign(1.0, False, direction)}
        for task in genome.own_tasks:
            self._signs[task.name] = sign(task.weight, OWN_TASKS[task.name].more_is_better, direction)
        self._upward = 1 if direction == "maximize" else -1

    def evaluate(
        self, split: Split, *, rung: int | None = None, weights: str | None = None
    ) -> tuple[Score, dict[str, dict[str, float]]]:
        """Score the resident model; see `Evaluator.evaluate`.

        Our own tasks are measured on the validation (or general) examples for the search, and on the test
        (or general test) examples for the holdout. Those that need answers to prompts have the share
        `truncated` besides: answers without an end. On a rung of a search that trains the loss of the
        validation examples is the whole score, whatever the tasks are: it says early which training is the
        better one, and the accuracy on a few items does not.
        """
        self.last = {}
        score: Score | None = None
        metrics: dict[str, dict[str, float]] = {}
        alone = self._trainer is not None and rung is not None
        if self._evaluator is not None and not alone:
            score, metrics = self._evaluator.evaluate(split, rung=rung, weights=weights)
            self.last = dict(self._evaluator.last)
        weighted = {VALIDATION_LOSS: self._weights.get(VALIDATION_LOSS) or 1.0} if alone else self._weights
        if not weighted or self._trainer is None:
            assert score is not None
            return score, metrics
        found, truncated = self._trainer.measure(split, list(weighted))
        value, squared, items = 0.0, 0.0, {}
        if score is not None:
            value = score.value
            squared = math.nan if score.stderr is None else score.stderr**2
            items = {task: list(values) for task, values in score.items.items()}
        for name, (whole, each) in found.items():
            metrics = {**metrics, name: {OWN_TASKS[name].metric: whole}}
            if OWN_TASKS[name].generates and truncated is not None:
                metrics[name]["truncated,none"] = truncated
            # More is better in items, in either direction.
            items[name] = [self._signs[name] * self._upward * one for one in each]
            value += self._signs[name] * weighted[name] * whole
            error = standard_error(each)
            squared += math.nan if error is None else (weighted[name] * error) ** 2
        return Score(value, None if math.isnan(squared) else math.sqrt(squared), items), metrics

    def known(self, split: Split, rung: int | None, weights: str) -> bool:
        """Whether `evaluate` with these arguments needs no model; see `Evaluator.known`."""
        if self._evaluator is None or self._weights:  # our own are not kept
            return False
        return self._evaluator.known(split, rung, weights)

    def describe(self) -> dict[str, Any]:
        """`Evaluator.describe()` with our own among its facts, and `train` and `shares`: the trainer's."""
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
            parts = OWN_TASKS[name].parts
            facts["items"][name] = {"search": counts[parts[0]], "holdout": counts[parts[1]]}
            facts["weights"][name] = weight
            facts["signs"][name] = self._signs[name]
        return facts
