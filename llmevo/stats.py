"""Intervals and tests for scores that are noisy: what a gain is worth.

Importing this imports only numpy. Scores of two models on the same items are paired: what both find hard
cancels, which makes the interval of their difference two to three times narrower than that of either score
(Miller 2024, https://arxiv.org/abs/2411.00640).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal, final

import numpy as np
import numpy.typing as npt

from llmevo.errors import StatsError

_NORMAL = NormalDist()
_CELLS = 2_000_000  # resampled items held in memory at once


@final
@dataclass(frozen=True, slots=True)
class Interval:
    """A confidence interval.

    Args:
        low: Lower end.
        high: Upper end; `low <= high`.
        estimate: The point estimate, in the unit of the ends.
        level: Confidence, in (0, 1).
    """

    low: float
    high: float
    estimate: float
    level: float

    @property
    def excludes_zero(self) -> bool:
        """Whether the whole interval lies on one side of zero: a difference larger than the noise."""
        return self.low > 0 or self.high < 0


def paired_difference(
    a: Mapping[str, Sequence[float]],
    b: Mapping[str, Sequence[float]],
    *,
    weights: Mapping[str, float] | None = None,
    level: float = 0.95,
    method: Literal["bca", "percentile", "normal"] = "bca",
    resamples: int = 5000,
    seed: int = 0,
) -> Interval:
    """How much better `a` scored than `b` on the same items: `sum over tasks of weight * mean(a - b)`.

    `bca` and `percentile` resample items within each task (Efron 1987; DiCiccio and Efron 1996,
    https://doi.org/10.1214/ss/1032280214); `normal` is closed form. If all differences within every task are
    equal, there is nothing to estimate the noise from and the interval is a point.

    Args:
        a: Per-item scores by task, as in `Score.items`; more is better.
        b: The same tasks and items, in the same order.
        weights: Weight by task; 1 for a task without one.
        level: Confidence, in (0, 1).
        method: How the interval is made.
        resamples: Bootstrap samples, at least 100.
        seed: Of the bootstrap.

    Raises:
        StatsError: The tasks or their numbers of items differ, an item is not finite, or an argument is
            out of range.
    """
    _check_level(level)
    if resamples < 100:
        raise StatsError(f"`resamples >= 100` must hold, but got {resamples}.")
    pairs = _pairs(a, b)
    strata = [
        (float((weights or {}).get(task, 1.0)), first - second) for task, (first, second) in pairs.items()
    ]
    estimate = math.fsum(weight * float(d.mean()) for weight, d in strata)
    if all(bool((d == d[0]).all()) for _, d in strata):
        return Interval(estimate, estimate, estimate, level)
    if method == "normal":
        variance = math.fsum(w**2 * float(d.var(ddof=1)) / len(d) for w, d in strata if len(d) > 1)
        half = _NORMAL.inv_cdf((1 + level) / 2) * math.sqrt(variance)
        return Interval(estimate - half, estimate + half, estimate, level)
    sample = np.sort(_bootstrap(strata, resamples, seed))
    tails = ((1 - level) / 2, (1 + level) / 2)
    if method == "bca":
        tails = _bca(sample, estimate, strata, tails)
    low, high = (float(np.quantile(sample, tail)) for tail in tails)
    return Interval(low, high, estimate, level)


def pseudo_values(whole: float, without: npt.NDArray[np.float64]) -> list[float]:
    """One number per item for a statistic of all items at once: the jackknife's (Tukey 1958).

    They are `n * whole - (n - 1) * without`, moved by a constant so that their plain mean is `whole`. Their
    standard error is that of the statistic, and those of two models on the same items are paired.

    Args:
        whole: The statistic of all items.
        without: The statistic without each item in turn, shape (items,), at least two.
    """
    count = len(without)
    items = count * whole - (count - 1) * without
    moved: list[float] = (items + (whole - items.mean())).tolist()
    return moved


def _bootstrap(
    strata: Sequence[tuple[float, npt.NDArray[np.float64]]], resamples: int, seed: int
) -> npt.NDArray[np.float64]:
    """Weighted sums of resampled means, shape (resamples,)."""
    rng = np.random.default_rng(seed)
    total = np.zeros(resamples)
    for weight, differences in strata:
        count = len(differences)
        rows = max(1, _CELLS // count)
        for start in range(0, resamples, rows):
            stop = min(start + rows, resamples)
            drawn = rng.integers(count, size=(stop - start, count))
            total[start:stop] += weight * differences[drawn].mean(axis=1)
    return total


def _bca(
    sample: npt.NDArray[np.float64],
    estimate: float,
    strata: Sequence[tuple[float, npt.NDArray[np.float64]]],
    tails: tuple[float, float],
) -> tuple[float, float]:
    """The quantiles that correct the percentile interval for bias and for acceleration (skewness)."""
    # Sums of 0/1 differences fall on a grid: a value within rounding of the estimate is a tie, counted half.
    slack = 1e-9 * max(1.0, abs(estimate))
    below = float(np.mean(sample < estimate - slack) + 0.5 * np.mean(np.abs(sample - estimate) <= slack))
    below = min(max(below, 1 / len(sample)), 1 - 1 / len(sample))
    bias = _NORMAL.inv_cdf(below)
    influence = np.concatenate([weight * (d - d.mean()) / len(d) for weight, d in strata])
    spread = float((influence**2).sum())
    acceleration = float((influence**3).sum()) / (6 * spread**1.5)

    def corrected(tail: float) -> float:
        z = bias + _NORMAL.inv_cdf(tail)
        return _NORMAL.cdf(bias + z / (1 - acceleration * z))

    return corrected(tails[0]), corrected(tails[1])


def paired_p_value(
    a: Mapping[str, Sequence[float]],
    b: Mapping[str, Sequence[float]],
    *,
    weights: Mapping[str, float] | None = None,
    resamples: int = 10_000,
    seed: int = 0,
) -> float:
    """Two-sided p-value that `a` and `b` score equally well on the same items.

    The exact McNemar test where every item was answered right or wrong and all tasks weigh the same.
    Otherwise the paired bootstrap: how often the weighted mean of resampled differences is as far from the
    observed one as that is from zero (Efron and Tibshirani 1993, ch. 16), at least 1 / (resamples + 1), and
    at least what an exact sign test of as many items can come to: a few resampled items show no noise.

    Args:
        a: Per-item scores by task, as in `Score.items`.
        b: The same tasks and items, in the same order.
        weights: Weight by task; 1 for a task without one.
        resamples: Bootstrap samples, at least 100.
        seed: Of the bootstrap.

    Raises:
        StatsError: The tasks or their numbers of items differ, an item is not finite, or `resamples` < 100.
    """
    if resamples < 100:
        raise StatsError(f"`resamples >= 100` must hold, but got {resamples}.")
    pairs = _pairs(a, b)
    sizes = {task: float((weights or {}).get(task, 1.0)) for task in pairs}
    first, second = (np.concatenate([pair[side] for pair in pairs.values()]) for side in (0, 1))
    levels = set(np.unique(np.concatenate([first, second])).tolist())
    if len(set(sizes.values())) == 1 and any(levels <= {wrong, wrong + 1.0} for wrong in (0.0, -1.0)):
        right = ((side > min(levels)).astype(float).tolist() for side in (first, second))
        return mcnemar(*right)
    strata = [(sizes[task], x - y) for task, (x, y) in pairs.items()]
    observed = math.fsum(weight * float(d.mean()) for weight, d in strata)
    apart = np.abs(_bootstrap(strata, resamples, seed) - observed)
    # Sums of 0/1 differences fall on a grid: what is as far to within rounding is as far.
    as_far = int((apart >= abs(observed) - 1e-9 * max(1.0, abs(observed))).sum())
    return max((1 + as_far) / (1 + resamples), _least(len(first)))


def _least(items: int) -> float:
    """The smallest two-sided p-value of an exact sign test, 2^(1 - n): all of n differences have one sign."""
    return min(1.0, 2.0 ** (1 - items))


@final
@dataclass(frozen=True, slots=True)
class Spread:
    """How far a score moves from seed to seed.

    Args:
        deviation: Standard deviation of one training's score.
        freedom: Degrees of freedom that it rests on, at least 1.
    """

    deviation: float
    freedom: int


def pooled_spread(groups: Sequence[Sequence[float]]) -> Spread | None:
    """The standard deviation within groups, taken to be the same in all; None where no group has two values.

    Args:
        groups: For each configuration, the scores of its trainings.
    """
    several = [np.array(group, dtype=float) for group in groups if len(group) > 1]
    freedom = sum(len(group) - 1 for group in several)
    if freedom == 0:
        return None
    squares = math.fsum(float(((group - group.mean()) ** 2).sum()) for group in several)
    return Spread(math.sqrt(squares / freedom), freedom)


def paired_over_seeds(
    a: Mapping[str, Sequence[float]],
    b: Mapping[str, Sequence[float]],
    seeds: tuple[int, int],
    spread: Spread,
    *,
    weights: Mapping[str, float] | None = None,
    level: float = 0.95,
) -> tuple[Interval, float]:
    """`paired_difference` and its two-sided p-value between means over trainings with several seeds.

    Other items would give another difference, and so would other seeds. The variance is the sum of both,
    `sum over tasks of weight^2 var(a - b) / n + deviation^2 (1 / seeds_a + 1 / seeds_b)`, and the statistic
    has a t distribution with the degrees of freedom of Welch and Satterthwaite (Satterthwaite 1946,
    https://doi.org/10.2307/3002019). As in `paired_p_value`, few items never make a small p-value.

    Args:
        a: Per-item scores by task, each the mean over the seeds.
        b: The same tasks and items.
        seeds: Trainings behind `a` and behind `b`; 0 for a model that no seed changes.
        spread: Of one training's score.
        weights: Weight by task; 1 for a task without one.
        level: Confidence, in (0, 1).

    Raises:
        StatsError: As `paired_difference`.
    """
    from scipy.special import stdtr, stdtrit

    _check_level(level)
    parts: list[tuple[float, float]] = []  # of the variance, with their degrees of freedom
    estimate, pairs = 0.0, _pairs(a, b)
    least = _least(sum(len(first) for first, _ in pairs.values()))
    for task, (first, second) in pairs.items():
        weight, gaps = float((weights or {}).get(task, 1.0)), first - second
        estimate += weight * float(gaps.mean())
        if len(gaps) > 1:
            parts.append((weight**2 * float(gaps.var(ddof=1)) / len(gaps), len(gaps) - 1))
    parts.append((spread.deviation**2 * sum(1 / count for count in seeds if count), spread.freedom))
    variance = math.fsum(part for part, _ in parts)
    if variance == 0:
        return Interval(estimate, estimate, estimate, level), max(float(estimate == 0), least)
    freedom = variance**2 / math.fsum(part**2 / count for part, count in parts)
    error = math.sqrt(variance)
    half = float(stdtrit(freedom, (1 + level) / 2)) * error
    p_value = max(2 * float(stdtr(freedom, -abs(estimate) / error)), least)
    return Interval(estimate - half, estimate + half, estimate, level), p_value


def mcnemar(a: Sequence[float], b: Sequence[float]) -> float:
    """Two-sided exact p-value that two models are right equally often on the same 0/1 items.

    Under the null, each item on which they differ is a fair coin (McNemar 1947; exact binomial form).

    Raises:
        StatsError: The numbers of items differ, or an item is neither 0 nor 1.
    """
    first, second = _pairs({"items": a}, {"items": b})["items"]
    if not np.isin(np.concatenate([first, second]), (0.0, 1.0)).all():
        raise StatsError("`a` and `b` must hold only 0 and 1; use paired_difference for other scores.")
    wins, losses = int((first > second).sum()), int((first < second).sum())
    total = wins + losses
    extreme = sum(math.comb(total, k) for k in range(min(wins, losses) + 1))
    p_value: float = 2 * extreme / 2**total
    return min(1.0, p_value)


def wilson(successes: int, count: int, level: float = 0.95) -> Interval:
    """Interval of a proportion that holds its level for few items too (Wilson 1927).

    Args:
        successes: Items solved, `0 <= successes <= count`.
        count: Items, at least 1.
        level: Confidence, in (0, 1).

    Raises:
        StatsError: An argument is out of range.
    """
    _check_level(level)
    if count < 1 or not 0 <= successes <= count:
        raise StatsError(f"`0 <= successes <= count` and `count >= 1` must hold, got {successes}, {count}.")
    z = _NORMAL.inv_cdf((1 + level) / 2)
    share = successes / count
    shrunk = 1 + z**2 / count
    middle = (share + z**2 / (2 * count)) / shrunk
    half = z / shrunk * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    # At 0 and `count` an end is exact; rounding must not push it past the estimate.
    low, high = max(0.0, middle - half), min(1.0, middle + half)
    return Interval(min(low, share), max(high, share), share, level)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for the number of tests, in the order given (Holm 1979).

    Rejecting those that stay below alpha keeps the chance of any false rejection below alpha.

    Raises:
        StatsError: A p-value is outside [0, 1].
    """
    if not all(0 <= p <= 1 for p in p_values):
        raise StatsError(f"`p_values` must lie in [0, 1], but got {list(p_values)!r}.")
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise StatsError(f"`0 < level < 1` must hold, but got {level}.")


def _pairs(
    a: Mapping[str, Sequence[float]], b: Mapping[str, Sequence[float]]
) -> dict[str, tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]]:
    """Both models' items by task as arrays, checked."""
    if not a or a.keys() != b.keys():
        raise StatsError(f"`a` and `b` must have the same tasks, but got {sorted(a)} and {sorted(b)}.")
    pairs = {}
    for task in a:
        first, second = np.array(a[task], dtype=float), np.array(b[task], dtype=float)
        if first.shape != second.shape or first.ndim != 1 or not first.size:
            raise StatsError(
                f"`a` and `b` must have the same items of {task!r}, at least one, but got {first.size} and "
                f"{second.size}."
            )
        if not (np.isfinite(first).all() and np.isfinite(second).all()):
            raise StatsError(f"`a` and `b` must be finite, but an item of {task!r} is not.")
        pairs[task] = (first, second)
    return pairs
