"""What a model is worth on examples: its losses, its classes or values, and what it says."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, final

import numpy as np
import numpy.typing as npt

from llmevo.errors import StageError
from llmevo.genome.own import NLL, OWN_TASKS
from llmevo.train import metrics
from llmevo.train.classify import HeadForward
from llmevo.train.data import Examples, Part
from llmevo.train.example import Example
from llmevo.train.forward import Losses
from llmevo.train.generate import generate
from llmevo.train.metrics import Measured

_TOKENS_AT_ONCE = 4096  # of a forward pass without gradients


@final
@dataclass(frozen=True, slots=True)
class Judge:
    """Measures the resident model, whatever is on it.

    Args:
        forward: Its forward pass.
        model: The model.
        tokenizer: Its tokenizer.
        data: The examples.
        context: Tokens that the model takes.
        most: Tokens of an answer at most; None for the longest that is known, its end included.
    """

    forward: Losses
    model: Any
    tokenizer: Any
    data: Examples
    context: int
    most: int | None = None

    def measure(self, part: Part, names: Sequence[str]) -> tuple[dict[str, Measured], float | None]:
        """Each metric with one number per example, in stored order; and the share of answers without an end.

        Args:
            part: Of the examples.
            names: Of `OWN_TASKS`.

        Raises:
            StageError: A loss or an output is not finite.
        """
        sitting = _Sitting(self, self.data.parts[part], part)
        found = {name: sitting.of(name) for name in names}
        asked = any(OWN_TASKS[name].generates for name in names)
        return found, (sum(sitting.said[1]) / len(sitting.examples) if asked else None)

    def longest_answer(self) -> int:
        """How many tokens an answer has at most."""
        parts = self.data.parts.values()
        return self.most or max(int(e.targets.sum()) for examples in parts for e in examples)


@final
class _Sitting:
    """The answers of one model to one part: each kind computed when a metric first asks for it."""

    def __init__(self, judge: Judge, examples: list[Example], part: Part) -> None:
        self.examples = examples
        self._judge, self._part = judge, part

    def of(self, name: str) -> Measured:
        if OWN_TASKS[name].metric == NLL:
            means = (self._losses / self._counts).tolist()
            return math.fsum(means) / len(means), means
        if name == "perplexity":
            return metrics.perplexity(self._losses, self._counts)
        if name == "bits_per_byte":
            sizes = [example.text.size for example in self.examples if example.text is not None]
            return metrics.bits_per_byte(self._losses, np.array(sizes, dtype=float))
        if OWN_TASKS[name].generates:
            answers, wanted = self.said[0], [e.text.answer for e in self.examples if e.text is not None]
            if name.startswith("rouge"):
                return metrics.rouge(name, answers, wanted)
            of_texts = {"exact_match": metrics.exact_match, "bleu": metrics.bleu, "chrf": metrics.chrf}
            return of_texts[name](answers, wanted)
        if OWN_TASKS[name].heads == ("regression",):
            values = np.array([example.value for example in self.examples])
            of_values = {"pearson": metrics.pearson, "spearman": metrics.spearman}
            return of_values[name](values, self._outputs[:, 0])
        labels = np.array([example.tokens[-1] for example in self.examples], dtype=float)
        predicted = self._outputs.argmax(axis=1).astype(float)
        if name == "f1":
            return metrics.f1(labels, predicted, self._outputs.shape[1])
        of_classes = {"accuracy": metrics.accuracy, "matthews": metrics.matthews}
        return of_classes[name](labels, predicted)

    @cached_property
    def _losses(self) -> npt.NDArray[np.float64]:
        return sums(self._judge.forward, self.examples, self._part)

    @cached_property
    def _counts(self) -> npt.NDArray[np.float64]:
        return np.array([example.targets.sum() for example in self.examples], dtype=float)

    @cached_property
    def _outputs(self) -> npt.NDArray[np.float64]:
        import torch

        forward = self._judge.forward
        assert isinstance(forward, HeadForward)
        rows: list[Any] = [None] * len(self.examples)
        with torch.inference_mode():
            for group in groups(self.examples):
                outputs = forward.outputs([self.examples[index] for index in group])
                for index, row in zip(group, outputs.double().cpu().numpy(), strict=True):
                    rows[index] = row
        found = np.stack(rows)
        if not np.isfinite(found).all():
            raise StageError("evaluate", f"the outputs for the {self._part} examples are not finite.")
        return found

    @cached_property
    def said(self) -> tuple[list[str], list[bool]]:
        judge = self._judge
        return generate(judge.model, judge.tokenizer, self.examples, judge.longest_answer(), judge.context)


def sums(forward: Losses, examples: Sequence[Example], part: Part) -> npt.NDArray[np.float64]:
    """The sum of each example's losses, in stored order.

    Raises:
        StageError: One of them is not finite.
    """
    import torch

    found = np.zeros(len(examples))
    with torch.inference_mode():
        for group in groups(examples):
            losses, owners = forward.losses([examples[index] for index in group])
            of_group = np.zeros(len(group))
            np.add.at(of_group, owners, losses.double().cpu().numpy())
            found[group] = of_group
    if not np.isfinite(found).all():
        raise StageError("evaluate", f"the loss of the {part} examples is not finite.")
    return found


def groups(examples: Sequence[Example]) -> Iterator[list[int]]:
    """Indices in groups of similar length, the longest first, with few enough tokens for one forward pass."""
    group: list[int] = []
    width = 0
    for index in sorted(range(len(examples)), key=lambda i: -len(examples[i])):
        width = width or len(examples[index])
        if group and (len(group) + 1) * width > _TOKENS_AT_ONCE:
            yield group
            group, width = [], len(examples[index])
        group.append(index)
    if group:
        yield group
