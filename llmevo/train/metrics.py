"""Metrics by their own libraries: each the library's number for the whole corpus, and one number per item.

The items' plain mean is the value. Where the metric is a mean (ROUGE's F-measures, accuracy), they are what
each item scored. Where it is one number for a corpus (BLEU, perplexity, a correlation), they are the
jackknife's pseudo-values, `stats.pseudo_values`, so that two models' items are paired as those of a mean.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from llmevo.stats import pseudo_values

Measured: TypeAlias = tuple[float, list[float]]
"""The value, and one number per item."""

_Array: TypeAlias = npt.NDArray[np.float64]


def perplexity(losses: _Array, counts: _Array) -> Measured:
    """`exp` of the mean loss per token of the whole corpus.

    Args:
        losses: Sum of each item's losses, in nats, shape (items,).
        counts: Tokens that they are of, shape (items,).
    """
    return _ratio(losses, counts, np.exp)


def bits_per_byte(losses: _Array, sizes: _Array) -> Measured:
    """Bits of loss per byte of text, which tokenizers do not change.

    Args:
        losses: Sum of each item's losses, in nats, shape (items,).
        sizes: UTF-8 bytes of the texts that are learnt, shape (items,).
    """
    return _ratio(losses, sizes, lambda mean: mean / math.log(2))


def _ratio(losses: _Array, weights: _Array, shown: Callable[[Any], Any]) -> Measured:
    whole = float(shown(losses.sum() / weights.sum()))
    if len(losses) == 1:
        return whole, [whole]
    without = shown((losses.sum() - losses) / (weights.sum() - weights))
    return whole, pseudo_values(whole, without)


def exact_match(answers: Sequence[str], wanted: Sequence[str]) -> Measured:
    """Share of answers that are what is wanted, white space around both aside."""
    return _mean([float(a.strip() == b.strip()) for a, b in zip(answers, wanted, strict=True)])


def rouge(kind: str, answers: Sequence[str], wanted: Sequence[str]) -> Measured:
    """Mean F-measure of rouge-score, without stemming, in [0, 1]; `rougeLsum` takes lines for sentences.

    Args:
        kind: `rouge1`, `rouge2`, `rougeL` or `rougeLsum`.
        answers: What the model said.
        wanted: What it should have said.
    """
    scorer = _rouge_scorer(kind)
    pairs = zip(wanted, answers, strict=True)
    return _mean([float(scorer.score(target, said)[kind].fmeasure) for target, said in pairs])


@cache
def _rouge_scorer(kind: str) -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer([kind])


def bleu(answers: Sequence[str], wanted: Sequence[str]) -> Measured:
    """Sacrebleu's corpus BLEU, in [0, 100]: 4-grams, its tokenizer 13a, exponential smoothing."""
    from sacrebleu.metrics.bleu import BLEU

    return _translation(BLEU(force=True), answers, wanted)


def chrf(answers: Sequence[str], wanted: Sequence[str]) -> Measured:
    """Sacrebleu's corpus chrF2, in [0, 100]: 6-grams of characters, no words."""
    from sacrebleu.metrics.chrf import CHRF

    return _translation(CHRF(), answers, wanted)


def _translation(metric: Any, answers: Sequence[str], wanted: Sequence[str]) -> Measured:
    # The sums that the score is made from, item by item, as sacrebleu's own resampling has them: leaving an
    # item out is a subtraction then, and not another pass over the corpus. Tested against `corpus_score`.
    stripped = [answer.strip() for answer in answers]
    references = [[text.strip() for text in wanted]]
    rows = np.array(metric._extract_corpus_statistics(stripped, references))
    total = rows.sum(axis=0)
    whole = float(metric._compute_score_from_stats(total.tolist()).score)
    if len(rows) == 1:
        return whole, [whole]
    rests = (total - rows).tolist()
    without = [float(metric._compute_score_from_stats(rest).score) for rest in rests]
    return whole, pseudo_values(whole, np.array(without))


def accuracy(labels: _Array, predicted: _Array) -> Measured:
    """Share of right classes."""
    return _mean([float(a == b) for a, b in zip(labels, predicted, strict=True)])


def matthews(labels: _Array, predicted: _Array) -> Measured:
    """Matthews' correlation coefficient (scikit-learn), in [-1, 1]; 0 where one class alone is predicted."""
    from sklearn.metrics import matthews_corrcoef

    def coefficient(first: _Array, second: _Array) -> float:
        with warnings.catch_warnings():  # where one class is all there is
            warnings.simplefilter("ignore", UserWarning)
            return float(matthews_corrcoef(first, second))

    return _of_pairs(labels, predicted, coefficient)


def f1(labels: _Array, predicted: _Array, classes: int) -> Measured:
    """F1 (scikit-learn), in [0, 1]: of two classes the second one's, as in GLUE; of more their mean."""
    from sklearn.metrics import f1_score

    options: dict[str, Any] = {"average": "binary", "pos_label": 1}
    if classes > 2:
        options = {"average": "macro", "labels": list(range(classes))}
    return _of_pairs(labels, predicted, lambda a, b: f1_score(a, b, zero_division=0.0, **options))


def _of_pairs(labels: _Array, predicted: _Array, function: Callable[[_Array, _Array], float]) -> Measured:
    """A function of a confusion matrix: leaving out one of two equal items leaves the same."""
    whole = float(function(labels, predicted))
    if len(labels) == 1:
        return whole, [whole]
    known: dict[tuple[float, float], float] = {}
    without = np.empty(len(labels))
    for index, pair in enumerate(zip(labels.tolist(), predicted.tolist(), strict=True)):
        if pair not in known:
            known[pair] = float(function(np.delete(labels, index), np.delete(predicted, index)))
        without[index] = known[pair]
    return whole, pseudo_values(whole, without)


def pearson(values: _Array, predicted: _Array) -> Measured:
    """Pearson's correlation (scipy), in [-1, 1]; 0 where it has none, as one side is constant."""
    from scipy.stats import pearsonr

    return _correlation(values, predicted, pearsonr)


def spearman(values: _Array, predicted: _Array) -> Measured:
    """Spearman's rank correlation (scipy), in [-1, 1]; 0 where it has none, as one side is constant."""
    from scipy.stats import spearmanr

    return _correlation(values, predicted, spearmanr)


def _correlation(values: _Array, predicted: _Array, function: Callable[[_Array, _Array], Any]) -> Measured:
    def statistic(first: _Array, second: _Array) -> float:
        if len(first) < 2 or np.ptp(first) == 0 or np.ptp(second) == 0:
            return 0.0
        with warnings.catch_warnings():  # nearly constant sides
            warnings.simplefilter("ignore")
            found = float(function(first, second)[0])
        return found if math.isfinite(found) else 0.0

    whole = statistic(values, predicted)
    if len(values) == 1:
        return whole, [whole]
    count = len(values)
    without = [statistic(np.delete(values, i), np.delete(predicted, i)) for i in range(count)]
    return whole, pseudo_values(whole, np.array(without))


def _mean(items: list[float]) -> Measured:
    return math.fsum(items) / len(items), items
