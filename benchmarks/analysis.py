"""What the stored runs say: tables, ratios with intervals, the verdicts, and the curves.

The measure is the true regret (0 at the optimum, 1 at the start point) of the point that an arm would hand
over: the one with the best observed score. Ratios are paired by instance: the same seed gives the same
problem, first points and luck. Logarithms are averaged, and the interval is a bootstrap over seeds within
each space (`llmevo.stats.paired_difference`), so the budgets of one run do not count as independent.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llmevo.stats import Interval, paired_difference

BUDGETS = (32, 64, 128)
_BY_SPACE = ("ga", "topk_mean", "hybrid+placebo", "hybrid+random", "hybrid+good", "optuna-tpe", "pycma")
_FLOOR = 1e-4  # a regret below this no evaluation here can tell from 0
_CONTINUOUS = ("ellipsoid", "rastrigin", "rosenbrock")
_MIXED = ("lora", "lora-far")
_TOLD = ("+good", "+fair")  # scripted guests that know about where the optimum is

Record = dict[str, Any]
Runs = dict[str, dict[str, dict[int, Record]]]  # arm -> space -> seed


def arranged(records: Iterable[Record]) -> Runs:
    """Runs by arm, space and seed."""
    from arms import arms

    order = {arm: place for place, arm in enumerate(arms())}
    runs: Runs = {}
    for record in sorted(records, key=lambda record: order.get(record["arm"], len(order))):
        runs.setdefault(record["arm"], {}).setdefault(record["space"], {})[record["seed"]] = record
    return runs


def at(curve: Sequence[Sequence[float]], count: int) -> float:
    """The value of a curve of steps after `count` evaluations, at least `_FLOOR`."""
    return max([value for place, value in curve if place <= count][-1], _FLOOR)


def regrets(runs: Runs, arm: str, space: str, count: int, kind: str = "chosen") -> dict[int, float]:
    """Regret by seed after `count` evaluations, of the runs that are long enough."""
    found = runs.get(arm, {}).get(space, {})
    return {seed: at(r[kind], count) for seed, r in sorted(found.items()) if r["budget"] >= count}


def ratio(
    runs: Runs, arm: str, base: str, spaces: Sequence[str], counts: Sequence[int], kind: str = "chosen"
) -> Interval | None:
    """Regret of `arm` over that of `base`: geometric mean over spaces, seeds and budgets, with 95 %.

    None where they share fewer than two instances of any space. Below 1, `arm` is better.
    """
    ours: dict[str, list[float]] = {}
    theirs: dict[str, list[float]] = {}
    for space in spaces:
        a = [regrets(runs, arm, space, count, kind) for count in counts]
        b = [regrets(runs, base, space, count, kind) for count in counts]
        shared = sorted(set.intersection(*map(set, a), *map(set, b)))
        if len(shared) >= 2:
            ours[space] = [float(np.mean([math.log(one[seed]) for one in a])) for seed in shared]
            theirs[space] = [float(np.mean([math.log(one[seed]) for one in b])) for seed in shared]
    if not ours:
        return None
    weights = dict.fromkeys(ours, 1 / len(ours))
    found = paired_difference(ours, theirs, weights=weights, resamples=2000)
    return Interval(math.exp(found.low), math.exp(found.high), math.exp(found.estimate), found.level)


def _spaces(runs: Runs) -> list[str]:
    from spaces import SPACES

    present = {space for by_space in runs.values() for space in by_space}
    return [space for space in SPACES if space in present] + sorted(present - set(SPACES))


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def medians(runs: Runs, count: int) -> str:
    """Median regret by arm and space after `count` evaluations.

    Bold is the lowest of a column among the arms that were not told the optimum.
    """
    spaces = _spaces(runs)
    found = {
        arm: {space: list(regrets(runs, arm, space, count).values()) for space in spaces} for arm in runs
    }
    lowest = {
        space: min(
            (np.median(found[arm][space]) for arm in runs if found[arm][space] and not arm.endswith(_TOLD)),
            default=0.0,
        )
        for space in spaces
    }
    rows = []
    for arm in runs:
        cells = []
        for space in spaces:
            values = found[arm][space]
            text = f"{np.median(values):.3f}" if values else "-"
            front = values and not arm.endswith(_TOLD) and np.median(values) <= lowest[space]
            cells.append(f"**{text}**" if front else text)
        rows.append([arm, *cells])
    return _table(["arm", *spaces], rows)


def _shown(found: Interval | None) -> str:
    return "-" if found is None else f"{found.estimate:.2f} [{found.low:.2f}, {found.high:.2f}]"


def _seeds(runs: Runs, arm: str) -> str:
    """How many instances of a space an arm has searched, the fewest and the most."""
    counts = sorted({len(by_seed) for by_seed in runs.get(arm, {}).values() if by_seed})
    return "-".join(str(count) for count in dict.fromkeys((counts[0], counts[-1]))) if counts else "0"


def ratios(
    runs: Runs, base: str = "cma", arms: Iterable[str] | None = None, counts: Sequence[int] = BUDGETS
) -> str:
    """Regret over that of `base`, by budget and over all, on the instances that both have searched."""
    spaces = _spaces(runs)
    rows = [
        [
            arm,
            _seeds(runs, arm),
            *(_shown(ratio(runs, arm, base, spaces, (count,))) for count in counts),
            _shown(ratio(runs, arm, base, spaces, counts)),
        ]
        for arm in (runs if arms is None else arms)
        if arm != base
    ]
    return _table(["arm", "seeds", *(f"{count} evaluations" for count in counts), "all"], rows)


def ratios_by_space(runs: Runs, arms: Sequence[str], base: str = "cma") -> str:
    """Regret over that of `base` in each space, over the three budgets."""
    rows = [
        [space, *(_shown(ratio(runs, arm, base, [space], BUDGETS)) for arm in arms)]
        for space in _spaces(runs)
    ]
    return _table(["space", *arms], rows)


def _line(holds: bool | None, text: str) -> str:
    return f"{'NOT RUN' if holds is None else 'PASS' if holds else 'FALLS SHORT'}  {text}"


def verdicts(runs: Runs) -> list[str]:
    """One line for each thing that must come out."""
    spaces = _spaces(runs)
    continuous = [space for space in spaces if space.startswith(_CONTINUOUS)]
    lines = []
    worst = ratio(runs, "hybrid+random", "cma", spaces, BUDGETS)
    lines.append(
        _line(
            worst and worst.estimate <= 1.10,
            f"hybrid with random JSON over cma, all spaces and budgets: {_shown(worst)}; wanted <= 1.10",
        )
    )
    good = ratio(runs, "hybrid+good", "cma", spaces, (32,))
    lines.append(
        _line(
            good and good.estimate <= 0.5,
            f"hybrid with the good guest over cma at 32 evaluations: {_shown(good)}; wanted <= 0.50",
        )
    )
    for other in ("cmaes", "optuna-cma", "pycma"):
        found = ratio(runs, "cma", other, continuous, BUDGETS)
        lines.append(
            _line(
                found and found.low <= 1.0,
                f"cma over {other}, continuous spaces: {_shown(found)}; wanted: not above 1 beyond the noise",
            )
        )
    for count in (64, 128):
        beaten = {space: ratio(runs, "ga", "random", [space], (count,)) for space in spaces}
        lost = [
            f"{space} {_shown(found)}" for space, found in beaten.items() if found and found.estimate >= 1
        ]
        unsure = [space for space, found in beaten.items() if found and found.estimate < 1 <= found.high]
        won = f"{len(beaten) - len(lost)} of {len(beaten)}"
        text = f"ga over random at {count} evaluations: {won} spaces won"
        text += f"; lost: {', '.join(lost)}" if lost else ""
        text += f"; won within the noise: {', '.join(unsure)}" if unsure else ""
        lines.append(_line(None if "ga" not in runs or "random" not in runs else not lost, text))
    for space in [space for space in _MIXED if space in spaces]:
        lines.append(_mixed(runs, space))
    return lines


def _mixed(runs: Runs, space: str) -> str:
    """Whether the default proposer is at or near the front of a mixed space."""
    rivals = [arm for arm in runs if "+" not in arm and arm != "cma"]
    against = {arm: ratio(runs, "cma", arm, [space], BUDGETS) for arm in rivals}
    ahead = [f"{arm} {_shown(found)}" for arm, found in against.items() if found and found.low > 1]
    near = [
        f"{arm} {_shown(found)}"
        for arm, found in against.items()
        if found and found.low <= 1 < found.estimate
    ]
    text = f"cma (the default) at or near the front of {space}"
    text += f"; clearly behind {', '.join(ahead)}" if ahead else "; no arm without a model is clearly ahead"
    text += f"; behind within the noise: {', '.join(near)}" if near else ""
    return _line(None if "cma" not in runs else not ahead, text)


def models(runs: Runs) -> str:
    """What became of the models' answers."""
    rows = []
    for arm, by_space in runs.items():
        total: dict[str, int] = {}
        for record in (record for by_seed in by_space.values() for record in by_seed.values()):
            for name, value in [*record["guests"].items(), ("evaluations", sum(record["origins"].values()))]:
                total[name] = total.get(name, 0) + value
        calls, points = total.get("calls", 0), total.get("points", 0)
        if calls:
            usable = calls - total.get("fallback", 0)
            rows.append(
                [
                    arm,
                    str(sum(len(by_seed) for by_seed in by_space.values())),
                    str(calls),
                    f"{100 * usable / calls:.1f} %",
                    f"{total.get('repaired', 0)}",
                    f"{100 * total.get('copied', 0) / points:.1f} %",
                    f"{100 * total.get('turned_away', 0) / points:.1f} %",
                    f"{100 * (points - total.get('turned_away', 0)) / total['evaluations']:.1f} %",
                ]
            )
    head = [
        "arm",
        "runs",
        "calls",
        "usable",
        "repaired",
        "points: copies",
        "turned away",
        "of the evaluations",
    ]
    return _table(head, rows)


def draw(runs: Runs, folder: Path) -> Path:
    """Median regret against evaluations, one panel a space; the chosen point's."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    spaces = _spaces(runs)
    columns = min(3, len(spaces))
    rows = math.ceil(len(spaces) / columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4.6 * columns, 3.2 * rows), squeeze=False)
    styles = {arm: _style(arm, place) for place, arm in enumerate(sorted(runs))}
    for panel, space in zip(axes.flat, spaces, strict=False):
        for arm in sorted(runs):
            found = [
                record for record in runs[arm].get(space, {}).values() if record["budget"] >= BUDGETS[-1]
            ]
            if found:
                counts = np.arange(4, BUDGETS[-1] + 1)
                curve = [np.median([at(record["chosen"], int(n)) for record in found]) for n in counts]
                panel.plot(counts, curve, label=arm, **styles[arm])
        panel.set_title(space, fontsize=10)
        panel.set_yscale("log")
        panel.yaxis.set_major_formatter("{x:g}")
        low, high = panel.get_ylim()
        marked = "25" if high > 5 * low else "23468"
        panel.yaxis.set_minor_formatter(lambda y, _, marked=marked: f"{y:g}" if f"{y:e}"[0] in marked else "")
        panel.tick_params(labelsize=8, which="both")
        panel.grid(alpha=0.25, which="both")
    for panel in list(axes.flat)[len(spaces) :]:
        panel.set_axis_off()
    for panel in axes[-1]:
        panel.set_xlabel("evaluations")
    for panel in axes[:, 0]:
        panel.set_ylabel("median true regret")
    handles = {
        label: handle
        for panel in axes.flat
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="lower center", ncols=7, fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    path = folder / "proposers.png"
    figure.savefig(path, dpi=90)
    plt.close(figure)
    return path


def _style(arm: str, place: int) -> dict[str, Any]:
    """Ours with a model solid and thick, ours without one solid, other libraries dashed."""
    from matplotlib import colormaps

    line: dict[str, Any] = {"color": colormaps["tab20"](place % 20), "linewidth": 1.3}
    if arm.startswith("hybrid"):
        line["linewidth"] = 2.0
    if arm.startswith("optuna") or arm in ("cmaes", "pycma"):
        line["linestyle"] = "--"
    if arm in ("random", "sobol"):
        line["linestyle"] = ":"
    return line


def report(records: Iterable[Record], folder: Path) -> str:
    """Everything, as Markdown; the curves go into `folder`."""
    runs = arranged(records)
    full = {
        arm: {
            space: long
            for space, found in by_space.items()
            if (long := {seed: r for seed, r in found.items() if r["budget"] >= BUDGETS[-1]})
        }
        for arm, by_space in runs.items()
    }
    full = {arm: by_space for arm, by_space in full.items() if by_space}
    parts = ["## Verdicts\n", *(f"- {line}" for line in verdicts(full))]
    parts += ["\n## Regret over that of cma", ratios(full)]
    if "hybrid+placebo" in full:
        guests = [arm for arm in full if "+" in arm]
        parts += ["\n## Regret over that of the placebo hybrid", ratios(full, "hybrid+placebo", guests)]
    parts += ["\n## Regret over that of cma, by space", ratios_by_space(full, _BY_SPACE)]
    if "hybrid+smollm2" in runs:
        parts.append("\n## The real model, as far as it was run")
        for base in ("cma", "hybrid+placebo", "random"):
            parts += [f"\nover {base}", ratios(runs, base, ["hybrid+smollm2"], (16, 32, 48))]
    for count in BUDGETS:
        parts += [f"\n## Median regret after {count} evaluations", medians(full, count)]
    parts += ["\n## Answers of the models", models(runs)]
    if full:
        parts.append(f"\n{draw(full, folder)}")
    return "\n".join(parts)
