"""Which items are asked, in which order, and how many of them on each rung."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from llmevo.genome import Genome
    from llmevo.genome.sections import HalvingSpec
    from llmevo.trial import Split


def draw_items(genome: Genome, task_name: str, count: int) -> dict[Split, list[int]]:
    """Which of a task's `count` items belong to which split, in stored order.

    The items are shuffled once with the run's seed. The first `limit` of them are used; of these the last
    `holdout` share is held out, at least one item and never all. `limit` counts both splits together.
    """
    rng = np.random.default_rng([genome.search.seed, zlib.crc32(task_name.encode())])
    chosen = rng.permutation(count)[: genome.limit].tolist()
    held = round(genome.evaluate.holdout * len(chosen))
    if genome.evaluate.holdout > 0:
        held = min(max(held, 1), len(chosen) - 1)
    return {"search": chosen[: len(chosen) - held], "holdout": chosen[len(chosen) - held :]}


def rung_sizes(halving: HalvingSpec, counts: dict[str, int]) -> list[dict[str, int]]:
    """How many items of each task each rung has, the last rung all of them.

    The first rung has about `halving.first` items over all tasks, each next one `eta` times as many. Every
    rung takes the same share of each task, rounded, and at least one item.

    Args:
        halving: The genome's section.
        counts: Items of each task in the search.
    """
    total = sum(counts.values())
    enabled = total >= 2 * halving.first if halving.enabled is None else halving.enabled
    rungs: list[dict[str, int]] = []
    size = halving.first
    while enabled and size < total:
        rung = {
            name: min(count, max(1, (2 * size * count + total) // (2 * total)))
            for name, count in counts.items()
        }
        if rung != counts and (not rungs or rung != rungs[-1]):
            rungs.append(rung)
        size *= halving.eta
    return [*rungs, dict(counts)]
