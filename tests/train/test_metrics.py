"""Each metric against its library on a whole corpus, and what its items say of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

pytest.importorskip("sacrebleu")
pytest.importorskip("rouge_score")
pytest.importorskip("sklearn")

from llmevo.stats import pseudo_values
from llmevo.train import metrics
from llmevo.trial import standard_error

WORDS = ["the", "cat", "sat", "on", "mat", ",", ".", "und", "Katze", "größer", "rot", "12", "house's", "a"]
ROUGE = ("rouge1", "rouge2", "rougeL", "rougeLsum")


def corpus(count: int, seed: int = 0) -> tuple[list[str], list[str]]:
    """Answers and what was wanted: alike in part, of unequal lengths, some empty, some of many lines."""
    rng = np.random.default_rng(seed)
    answers, wanted = [], []
    for index in range(count):
        right = rng.choice(WORDS, int(rng.integers(1, 25))).tolist()
        said = [w if rng.random() < 0.7 else str(rng.choice(WORDS)) for w in right]
        said = said[: int(rng.integers(0, len(said) + 1))] if index % 5 == 0 else said
        separator = "\n" if index % 7 == 0 else " "
        wanted.append(separator.join(right))
        answers.append(" " + separator.join(said))
    return answers, wanted


@pytest.fixture(scope="module")
def pairs() -> tuple[list[str], list[str]]:
    return corpus(300)


@pytest.mark.parametrize("kind", ROUGE)
def test_rouge_is_the_mean_of_rouge_score(kind: str, pairs: tuple[list[str], list[str]]) -> None:
    from rouge_score.rouge_scorer import RougeScorer
    from rouge_score.scoring import BootstrapAggregator

    answers, wanted = pairs
    value, items = metrics.rouge(kind, answers, wanted)
    scorer = RougeScorer(ROUGE)  # all kinds at once, as a user would
    aggregator = BootstrapAggregator(n_samples=200)
    for target, said in zip(wanted, answers, strict=True):
        aggregator.add_scores(scorer.score(target, said))
    band = aggregator.aggregate()[kind]
    assert band.low.fmeasure <= value <= band.high.fmeasure
    assert items == [scorer.score(t, a)[kind].fmeasure for t, a in zip(wanted, answers, strict=True)]
    assert value == pytest.approx(sum(items) / 300)


def test_rouge_counts_every_pair_for_every_kind() -> None:
    """A known bug: rouge1 of the first pair, rouge2 of the second and rougeL of the third, and no others."""
    answers, wanted = ["a b c", "x", "y", "a b c"], ["a b c", "a b", "a b", "a b c"]
    assert {kind: metrics.rouge(kind, answers, wanted)[0] for kind in ROUGE} == dict.fromkeys(ROUGE, 0.5)


def test_rouge_lsum_takes_lines_for_sentences() -> None:
    answers, wanted = ["second one\nfirst one"], ["first one\nsecond one"]
    assert metrics.rouge("rougeLsum", answers, wanted)[0] == 1.0
    assert metrics.rouge("rougeL", answers, wanted)[0] < 1.0


@pytest.mark.parametrize(("name", "function"), [("BLEU", metrics.bleu), ("CHRF", metrics.chrf)])
def test_translation_metrics_are_sacrebleus_for_the_corpus(
    name: str, function: Callable[..., metrics.Measured], pairs: tuple[list[str], list[str]]
) -> None:
    import sacrebleu.metrics

    answers, wanted = ([text.strip() for text in texts] for texts in pairs)
    metric = getattr(sacrebleu.metrics, name)()
    value, items = function(*pairs)
    assert value == pytest.approx(metric.corpus_score(answers, [wanted]).score, abs=1e-9)
    assert sum(items) / 300 == pytest.approx(value)
    # A known bug: the mean of the sentences' own scores in place of the corpus's.
    sentences = [metric.sentence_score(a, [w]).score for a, w in zip(answers, wanted, strict=True)]
    assert abs(sum(sentences) / 300 - value) > 0.1
    few = [texts[:12] for texts in (answers, wanted)]
    without = [
        metric.corpus_score(few[0][:i] + few[0][i + 1 :], [few[1][:i] + few[1][i + 1 :]]).score
        for i in range(12)
    ]
    whole = metric.corpus_score(few[0], [few[1]]).score
    assert function(*few)[1] == pytest.approx(pseudo_values(whole, np.array(without)), abs=1e-6)


def test_bleu_of_nothing_in_common_is_small_and_of_equals_is_100() -> None:
    assert metrics.bleu(["x y z w q"], ["a b c d e"])[0] < 10
    assert metrics.bleu(["a b c d e"], ["a b c d e"])[0] == pytest.approx(100)
    assert metrics.bleu(["", ""], ["a b c d e", "f"]) == (0.0, [0.0, 0.0])


def test_exact_match_forgives_white_space_around_and_nothing_else() -> None:
    assert metrics.exact_match([" Paris\n", "paris", "", "Par is"], ["Paris"] * 4)[1] == [1, 0, 0, 0]


@pytest.mark.parametrize("classes", [2, 4])
def test_glue_metrics_are_scikit_learns(classes: int) -> None:
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    rng = np.random.default_rng(classes)
    labels = rng.integers(0, classes, 300).astype(float)
    predicted = np.where(rng.random(300) < 0.6, labels, rng.integers(0, classes, 300))
    assert metrics.accuracy(labels, predicted)[0] == pytest.approx(accuracy_score(labels, predicted))
    average = "binary" if classes == 2 else "macro"
    for (value, items), theirs in [
        (metrics.matthews(labels, predicted), matthews_corrcoef),
        (metrics.f1(labels, predicted, classes), lambda a, b: f1_score(a, b, average=average)),
    ]:
        assert value == pytest.approx(theirs(labels, predicted))
        assert sum(items) / 300 == pytest.approx(value)
        without = theirs(np.delete(labels, 7), np.delete(predicted, 7))
        pseudo = 300 * value - 299 * without
        shift = items[7] - pseudo  # the same for all
        other = 300 * value - 299 * theirs(np.delete(labels, 11), np.delete(predicted, 11))
        assert items[11] - other == pytest.approx(shift, abs=1e-6)


def test_correlations_are_scipys_and_constants_have_none() -> None:
    from scipy.stats import pearsonr, spearmanr

    rng = np.random.default_rng(0)
    values = rng.normal(size=200)
    predicted = values + rng.normal(size=200)
    for function, theirs in ((metrics.pearson, pearsonr), (metrics.spearman, spearmanr)):
        value, items = function(values, predicted)
        assert value == pytest.approx(theirs(values, predicted)[0])
        assert sum(items) / 200 == pytest.approx(value)
        # Fisher's standard error of a correlation.
        assert standard_error(items) == pytest.approx((1 - value**2) / math.sqrt(199), rel=0.3)
        assert function(values, np.ones(200)) == (0.0, [0.0] * 200)
    assert metrics.matthews(np.array([0.0, 1.0, 1.0]), np.ones(3))[0] == 0.0


def test_perplexity_and_bits_are_those_of_the_corpus() -> None:
    losses, counts = np.array([2.0, 9.0, 1.0]), np.array([1.0, 6.0, 1.0])
    value, items = metrics.perplexity(losses, counts)
    assert value == pytest.approx(math.exp(12 / 8))
    assert sum(items) / 3 == pytest.approx(value)
    bits, _ = metrics.bits_per_byte(losses, np.array([4.0, 20.0, 4.0]))
    assert bits == pytest.approx(12 / 28 / math.log(2))


@pytest.mark.parametrize(
    "function",
    [
        lambda texts, _: metrics.bleu(texts, texts),
        lambda texts, _: metrics.chrf(texts, texts),
        lambda _, n: metrics.perplexity(n, n),
        lambda _, n: metrics.matthews(n, n),
        lambda _, n: metrics.f1(n, n, 2),
        lambda _, n: metrics.pearson(n, n),
    ],
)
def test_one_item_is_the_value_itself(function: Callable[[Any, Any], metrics.Measured]) -> None:
    value, items = function(["a b c d e"], np.ones(1))
    assert items == [value]
