"""Candidates per hour: llmevo, mergekit-evolve, and mergekit and lm-eval from the command line.

    python benchmarks/evolve/setup.py                mergekit-evolve's environment, once
    python benchmarks/loop.py                        every block that is not stored yet, then the report
    python benchmarks/loop.py --methods ties --systems llmevo "command line" --blocks 2
    python benchmarks/loop.py --compare              weights and float32 scores, by the merges that were kept
    python benchmarks/loop.py --limits               where llmevo's seconds go, and the machine's own speed
    python benchmarks/loop.py --report               the tables from what is stored

Each system evaluates the same candidates (`loop_data.py`) on the same threads in the same dtype. A block is
one process of one system on some candidates; blocks of the systems take turns, A B A B. The slow systems have
fewer candidates in a block: the seconds of one hardly vary. Figures are medians over candidates.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import statistics
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import loop_data
from loop_systems import SYSTEMS, Row, Setting

RESULTS = Path(__file__).resolve().parent / "results"
FILE = "loop.json"
METHODS = ("linear", "ties")
PER_BLOCK = {  # candidates; others 2
    "llmevo, as it comes": 10,
    "llmevo, exact": 1,
    "mergekit-evolve, 1 thread": 1,
}
TARGETS = {"linear": 10.0, "ties": 30.0}
PEER = "mergekit-evolve"


def blocks(systems: Sequence[str], count: int) -> Iterable[tuple[str, list[int]]]:
    """The order of things: in each round one block of each system, on candidates from 1 on."""
    for turn in range(count):
        for system in systems:
            size = PER_BLOCK.get(system, 2)
            yield system, list(range(1 + turn * size, 1 + (turn + 1) * size))


def load(path: Path) -> dict[str, Any]:
    """What is stored: `rows` by method, items, system and candidate, `starts`, `limits`, `compared`."""
    return json.loads(path.read_text()) if path.is_file() else {"rows": {}, "starts": {}}


def store(path: Path, data: dict[str, Any]) -> None:
    """Keep it, with the versions."""
    path.parent.mkdir(parents=True, exist_ok=True)
    packages = ("llmevo", "torch", "transformers", "mergekit", "lm_eval", "numba")
    data["machine"] = {
        "python": platform.python_version(),
        "machine": platform.machine(),
        **{package: metadata.version(package) for package in packages},
    }
    path.write_text(json.dumps(data, indent=1, sort_keys=True) + "\n")


def key(setting: Setting, system: str) -> str:
    """Under which rows are stored."""
    return f"{setting.method} {setting.items} {system}"


def measure(setting: Setting, systems: Sequence[str], count: int, path: Path) -> None:
    """Run the blocks that are not stored."""
    for system, candidates in blocks(systems, count):
        data = load(path)
        rows = data["rows"].setdefault(key(setting, system), {})
        if all(str(number) in rows for number in candidates):
            continue
        start, made = SYSTEMS[system](setting, candidates)
        rows |= {str(row["candidate"]): row for row in made}
        data["starts"].setdefault(key(setting, system), []).append(start)
        store(path, data)
        print(f"{key(setting, system)} {candidates}: {median(made, 'wall'):.1f} s each", flush=True)


def median(rows: Iterable[Row], name: str) -> float:
    """The median over candidates."""
    return statistics.median(row[name] for row in rows)


def table(data: dict[str, Any], method: str, items: int) -> str:
    """Candidates per hour of each system, and how llmevo compares with it."""
    rows = {s: list(data["rows"].get(f"{method} {items} {s}", {}).values()) for s in SYSTEMS}
    lines = [
        f"### {method}, {items} items",
        "| system | candidates | start, s | merge, s | evaluate, s | rest, s | a candidate, s | an hour | "
        f"times {PEER} |",
        "|---" * 9 + "|",
    ]
    peer = median(rows[PEER], "wall") if rows[PEER] else None
    for system, made in rows.items():
        if not made:
            continue
        wall, merge, evaluate = (median(made, name) for name in ("wall", "merge", "evaluate"))
        start = statistics.median(data["starts"][f"{method} {items} {system}"])
        ratio = "" if peer is None or system == PEER else f"{peer / wall:.1f}"
        lines.append(
            f"| {system} | {len(made)} | {start:.1f} | {merge:.3f} | {evaluate:.2f} | "
            f"{median_rest(made):.3f} | {wall:.2f} | {3600 / wall:.0f} | {ratio} |"
        )
    return "\n".join([*lines, "", *verdict(rows, method), *agreement(rows, items)])


def median_rest(rows: Iterable[Row]) -> float:
    """What is neither merge nor evaluation."""
    return statistics.median(row["wall"] - row["merge"] - row["evaluate"] for row in rows)


def verdict(rows: dict[str, list[Row]], method: str) -> list[str]:
    """Whether the target of the method is met."""
    target = TARGETS.get(method)
    if target is None or not rows["llmevo"] or not rows[PEER]:
        return []
    lines = []
    for system, made in rows.items():
        if made and system.startswith("llmevo"):
            ratio = median(rows[PEER], "wall") / median(made, "wall")
            found = "PASS" if ratio >= target else "FAIL"
            lines.append(f"- {found}  {system}: {ratio:.1f} times {PEER}; wanted {target:g}")
    share = median_rest(rows["llmevo"]) / median(rows["llmevo"], "wall")
    lines.append(
        f"- {'PASS' if share < 0.03 else 'FAIL'}  {share:.2%} of a trial outside merge and evaluation; "
        "wanted < 3 %"
    )
    return lines


def agreement(rows: dict[str, list[Row]], items: int) -> list[str]:
    """How far the systems' accuracies lie apart, in questions."""
    lines = []
    own = {row["candidate"]: row["tasks"] for row in rows["llmevo"]}
    for system, made in rows.items():
        both = [r for r in made if system != "llmevo" and "tasks" in r and r["candidate"] in own]
        if not both:
            continue
        each = items // len(loop_data.TASKS)
        apart = [
            round(abs(row["tasks"][task] - own[row["candidate"]][task]) * each)
            for row in both
            for task in loop_data.TASKS
        ]
        lines.append(
            f"- {system}: {sum(apart)} of {len(both) * len(loop_data.TASKS) * each} answers counted "
            f"otherwise than by llmevo (net, by task and candidate; at most {max(apart)})"
        )
    return lines


def report(data: dict[str, Any]) -> str:
    """Every table."""
    found = sorted({tuple(name.split(" ", 2)[:2]) for name in data["rows"]})
    parts = [table(data, method, int(items)) for method, items in found]
    if "compared" in data:
        parts.append(json.dumps(data["compared"], indent=1))
    if "limits" in data:
        import loop_limits

        parts.append(loop_limits.table(data["limits"]))
    return "\n\n".join(parts)


def main() -> None:
    """Measure what is asked for and not stored, then print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--methods", nargs="+", choices=loop_data.METHODS, default=list(METHODS))
    parser.add_argument("--systems", nargs="+", choices=list(SYSTEMS), default=list(SYSTEMS))
    parser.add_argument(
        "--blocks", type=int, default=5, help="of each system; 2 candidates in each, 10 as it comes"
    )
    parser.add_argument("--items", type=int, default=150, help="questions, over three tasks")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--evolve", type=Path, default=Setting.evolve, help="python of its environment")
    parser.add_argument("--prefix", default="", help="before each measured command")
    parser.add_argument("--report", action="store_true", help="only the tables")
    parser.add_argument("--compare", action="store_true", help="only weights and float32 scores")
    parser.add_argument("--limits", action="store_true", help="only where the seconds go")
    parser.add_argument("--file", type=Path, default=RESULTS / FILE)
    options = parser.parse_args()
    prefix = tuple(shlex.split(options.prefix))
    for method in [] if options.report else options.methods:
        setting = Setting(method, options.items, options.threads, options.evolve, prefix)
        setting.paths.update(loop_data.prepare(method, 1 + 2 * options.blocks, options.items))
        if options.compare or options.limits:
            import loop_limits

            data = load(options.file)
            part, make = (
                ("compared", loop_limits.compare) if options.compare else ("limits", loop_limits.limits)
            )
            data.setdefault(part, {})[method] = make(setting)
            store(options.file, data)
        else:
            measure(setting, options.systems, options.blocks, options.file)
    print(report(load(options.file)))


if __name__ == "__main__":
    main()
