"""Tables and the figure of benchmarks/lora_search.py.

A difference is between two arms' chosen candidates on the same test examples with the same seed. Its interval
comes from resampling seeds and examples, each with replacement and independently of each other (the
pigeonhole bootstrap: Owen 2007, https://doi.org/10.1214/07-AOAS122), so that it holds for other seeds and for
other words. It is a little too wide rather than too narrow; five seeds are few all the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from lora_candidates import Record, mean
from lora_search import ALONE, ARMS

from llmevo.stats import Interval

_RESAMPLES = 10_000
_BASES = ("default", "default again", "random")
Array = npt.NDArray[np.float64]


def difference(a: Array, b: Array, level: float = 0.95) -> Interval:
    """The mean of `a - b`, both of shape (seeds, examples), with its interval over both."""
    apart = a - b
    seeds, items = apart.shape
    rng = np.random.default_rng(0)
    by_seed = rng.multinomial(seeds, [1 / seeds] * seeds, _RESAMPLES) / seeds
    by_item = rng.multinomial(items, [1 / items] * items, _RESAMPLES) / items
    drawn = ((by_seed @ apart) * by_item).sum(axis=1)
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high), float(apart.mean()), level)


def incumbents(records: Mapping[str, Record], run: Record) -> list[Record]:
    """Which candidate a run would hand over after each of its trainings.

    Until one has not diverged, there is none, and the list is shorter.
    """
    found: list[Record] = []
    for key in run["candidates"]:
        record = records[key]
        loss = mean(record["validation"]) if "error" not in record else float("inf")
        if found and loss >= mean(found[-1]["validation"]):
            found.append(found[-1])
        elif "error" not in record:
            found.append(record)
    return found


def runs_of(records: Mapping[str, Record]) -> dict[str, dict[int, Record]]:
    """The runs by arm and seed; those in which nothing was trained to the end are left out."""
    found: dict[str, dict[int, Record]] = {arm: {} for arm in ARMS}
    for record in records.values():
        if "arm" in record and record["best"]:
            found[record["arm"]][record["seed"]] = record
    return {arm: runs for arm, runs in found.items() if runs}


def held_out(records: Mapping[str, Record], runs: Mapping[int, Record], seeds: Sequence[int]) -> Array:
    """The chosen candidates' losses, shape (seeds, examples)."""
    return np.array([records[runs[seed]["best"]]["test"] for seed in seeds])


def results(records: Mapping[str, Record]) -> str:
    """Each arm's held-out loss, and its difference to what needs no search and to random points."""
    runs = runs_of(records)
    lines = [
        "| arm | seeds | tokens | held-out loss | to default | to default again | to random | optimism |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for arm, by_seed in runs.items():
        seeds = sorted(by_seed)
        chosen = [records[by_seed[seed]["best"]] for seed in seeds]
        tested = held_out(records, by_seed, seeds).mean()
        spent = np.mean([sum(records[k].get("tokens", 0) for k in by_seed[s]["candidates"]) for s in seeds])
        optimism = tested - np.mean([mean(record["validation"]) for record in chosen])
        cells = [arm, str(len(seeds)), f"{spent:.0f}", f"{tested:.3f}"]
        for base in _BASES:
            shared = [seed for seed in seeds if seed in runs.get(base, {})]
            if arm == base or not shared:
                cells.append("")
                continue
            found = difference(held_out(records, by_seed, shared), held_out(records, runs[base], shared))
            cells.append(f"{found.estimate:+.3f} [{found.low:+.3f}, {found.high:+.3f}]")
        lines.append("| " + " | ".join([*cells, f"{optimism:+.3f}"]) + " |")
    return "\n".join(lines)


def winners(records: Mapping[str, Record]) -> str:
    """The settings that each searching arm chose."""
    lines = [
        "| arm | learning rate | batch size | rank | target modules | adapter |",
        "|---|---|---|---|---|---|",
    ]
    for arm, by_seed in runs_of(records).items():
        if arm in ALONE:
            continue
        chosen = [records[by_seed[seed]["best"]]["settings"] for seed in sorted(by_seed)]
        rates = ", ".join(
            f"{s['learning_rate']:.1e}" for s in sorted(chosen, key=lambda s: s["learning_rate"])
        )
        names = ("batch_size", "rank", "target_modules", "adapter")
        cells = [_counted([settings[name] for settings in chosen]) for name in names]
        lines.append("| " + " | ".join([arm, rates, *cells]) + " |")
    return "\n".join(lines)


def _counted(values: Sequence[Any]) -> str:
    return ", ".join(f"{value} ({count})" for value, count in sorted(Counter(values).items(), key=str))


def facts(records: Mapping[str, Record]) -> str:
    """How many trainings there were, how many diverged, and what validation says of the test."""
    trained = [record for record in records.values() if "settings" in record]
    both = [record for record in trained if "test" in record]
    validation, test = (np.array([mean(r[part]) for r in both]) for part in ("validation", "test"))
    ranks = [values.argsort().argsort() for values in (validation, test)]
    diverged = sum("error" in record for record in trained)
    minutes = sum(record.get("seconds", 0) for record in trained) / 60
    return (
        f"{len(trained)} different trainings, {diverged} diverged, {minutes:.0f} minutes of one core; of the "
        f"{len(both)} whose test loss is known, its rank correlation with the validation loss is "
        f"{np.corrcoef(*ranks)[0, 1]:.2f}."
    )


def draw(records: Mapping[str, Record], folder: Path) -> Path:
    """The chosen candidate's held-out loss against trainings, and where each seed ended."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import colormaps
    from matplotlib import pyplot as plt

    runs = runs_of(records)
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4), width_ratios=(3, 2))
    colors = {arm: colormaps["tab20"]((2 * place) % 20 + place // 10) for place, arm in enumerate(ARMS)}
    for arm, by_seed in runs.items():
        curves = [[mean(r["test"]) for r in incumbents(records, run)] for run in by_seed.values()]
        style: dict[str, Any] = {"color": colors[arm], "linestyle": "--" if arm in ALONE else "-"}
        length = max(len(run["candidates"]) for run in by_seed.values())
        if length == 1:
            left.axhline(np.mean(curves), label=arm, **style)
        else:
            left.plot(range(1, length + 1), np.mean(curves, axis=0), label=arm, **style)
    for place, (arm, by_seed) in enumerate(reversed(runs.items())):
        ends = [mean(records[run["best"]]["test"]) for run in by_seed.values()]
        right.plot(ends, [place] * len(ends), "o", color=colors[arm], alpha=0.6)
        right.plot([np.mean(ends)] * 2, [place - 0.3, place + 0.3], color=colors[arm], linewidth=2.5)
    right.set_yticks(range(len(runs)), list(reversed(runs)))
    left.set_xlabel("trainings of 4000 tokens")
    left.set_ylabel("held-out loss of the chosen one, nats per token")
    right.set_xlabel("held-out loss at the end, a dot a seed; line: mean")
    left.set_ylim(top=2.45)  # room for the legend
    left.legend(fontsize=8, frameon=False, ncols=3, loc="upper center")
    for panel in (left, right):
        panel.grid(alpha=0.25)
    figure.tight_layout()
    path = folder / "lora-search.png"
    figure.savefig(path, dpi=90)
    plt.close(figure)
    return path


def report(records: Mapping[str, Record], folder: Path) -> str:
    """Everything, as Markdown; the figure goes into `folder`."""
    tables = [results(records), winners(records), facts(records)]
    return "\n\n".join([*tables, str(draw(records, folder))])
