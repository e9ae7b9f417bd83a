"""From lm-eval's raw values per item to one number per item, and to the score.

Raw values are whatever a task's `process_results` returns: a number for metrics that are means, a tuple such
as (log-likelihood, words) for those that need all items at once.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from llmevo.stats import pseudo_values

Aggregation: TypeAlias = Callable[[Sequence[Any]], float]

# sacrebleu takes tens of milliseconds a corpus; leaving out each item in turn would multiply that.
_CORPUS = {"bleu", "chrf", "chrfpp", "ter"}


def per_item(values: Sequence[Any], aggregation: Aggregation) -> list[float]:
    """One number per item, whose plain mean is `aggregation(values)`.

    For a mean these are the values. Otherwise they are the jackknife's pseudo-values
    `n * f(all) - (n - 1) * f(all but i)` (Tukey 1958), whose standard error is that of the metric, moved by a
    constant so that their mean is the metric itself. Translation metrics take each sentence's own score in
    place of the pseudo-value.

    Args:
        values: Raw values, in item order; at least one.
        aggregation: lm-eval's aggregation of the metric.

    Returns:
        As many floats as there are values; not finite where the aggregation is not.
    """
    name = getattr(aggregation, "__name__", "")
    if name == "mean":
        return [float(value) for value in values]
    whole = float(aggregation(values))
    count = len(values)
    if count == 1:
        return [whole]
    if name in _CORPUS:
        items = np.array([float(aggregation([value])) for value in values])
        centred: list[float] = (items + (whole - items.mean())).tolist()
        return centred
    without = _closed_form(values, name)
    if without is None:
        without = np.array([_leave_out(values, i, aggregation, whole) for i in range(count)])
    return pseudo_values(whole, without)


def _leave_out(values: Sequence[Any], index: int, aggregation: Aggregation, whole: float) -> float:
    """The aggregation without item `index`; `whole` where it has no value (no positive item left, say)."""
    with contextlib.suppress(ValueError, ZeroDivisionError):
        rest = float(aggregation([*values[:index], *values[index + 1 :]]))
        if math.isfinite(rest):
            return rest
    return whole


def _closed_form(values: Sequence[Any], name: str) -> npt.NDArray[np.float64] | None:
    """What a likelihood metric would be without each item, from two sums; None for other metrics."""
    if name == "perplexity":
        likelihood = np.array(values, dtype=float)
        weight = np.ones(len(values))
    elif name in ("weighted_perplexity", "bits_per_byte"):
        likelihood, weight = np.array(values, dtype=float).T
    else:
        return None
    rest = -(likelihood.sum() - likelihood) / (weight.sum() - weight)
    without: npt.NDArray[np.float64] = rest / math.log(2) if name == "bits_per_byte" else np.exp(rest)
    return without


def gold(loglikelihoods: Sequence[float], golds: Sequence[int]) -> dict[str, float]:
    """How sure a model is of the right choice: smoother than whether it picked it.

    Args:
        loglikelihoods: Log-likelihood of each choice, in nats.
        golds: Indices of the right choices.

    Returns:
        `gold_logprob`, the log-probability of the right choices among all choices (<= 0; the choices'
        probabilities normalised to one), and `gold_margin`, the best right choice's log-likelihood less
        the best wrong one's (> 0 where `acc` is 1).
    """
    scores = np.array(loglikelihoods, dtype=float)
    right = np.zeros(len(scores), dtype=bool)
    right[list(golds)] = True
    best = float(scores.max())
    total = float(np.log(np.exp(scores - best).sum()))
    among = float(np.logaddexp.reduce(scores[right] - best))
    wrong = scores[~right]
    margin = float(scores[right].max() - wrong.max()) if wrong.size else 0.0
    return {"gold_logprob": min(among - total, 0.0), "gold_margin": margin}


def sign(weight: float, higher_is_better: bool, direction: str) -> int:
    """Whether a metric adds to the score (+1) or is taken from it (-1), after `|weight|`.

    A metric's own direction is honoured: under `maximize`, a metric of which less is better is subtracted;
    under `minimize`, one of which more is better is. A negative weight says that the user has turned the sign
    already, as users of mergekit-evolve had to for perplexities, and is taken at its word: the metric is
    subtracted in both directions.
    """
    if weight < 0:
        return -1
    return 1 if higher_is_better == (direction == "maximize") else -1
