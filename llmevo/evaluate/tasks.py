"""Which lm-eval tasks a genome names: whether they exist, have the metric, and may be tuned on.

Nothing here loads weights or data sets, or runs a task's code: lm-eval's index holds each task's YAML with
its functions unresolved.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmevo.errors import GenomeError
from llmevo.genome.own import OWN_TASKS

if TYPE_CHECKING:
    from llmevo.genome import Genome, TaskSpec

BENCHMARKS = (
    "mmlu",
    "hendrycks",
    "agieval",
    "gsm8k",
    "hellaswag",
    "winogrande",
    "arc_",
    "ai2_arc",
    "truthfulqa",
    "bigbench",
    "piqa",
    "openbookqa",
    "leaderboard",
)
"""How the names of public benchmarks begin; the list is that of mergekit-evolve's own guard."""

GOLD_METRICS = ("gold_logprob", "gold_margin")
"""Metrics that every multiple-choice task has here, beyond lm-eval's own; see `measures.gold`."""


def check_tasks(genome: Genome, allow_benchmarks: bool) -> None:
    """Check the genome's tasks before anything is spent.

    A task from one of `evaluate.task_path` is the user's own, whatever its name: it takes precedence over a
    built-in one. Built-in tasks that a local group holds are not the user's own.

    Args:
        genome: The genome.
        allow_benchmarks: Let public benchmarks pass, which lm-eval scores on their test or validation split.

    Raises:
        GenomeError: A folder or a task is not there, a task does not have the metric, or it is a benchmark.
    """
    tasks = genome.for_lm_eval()
    if tasks is None:
        return
    genome = tasks
    check_folders(genome)
    local = local_index(genome)
    for spec in genome.tasks:  # before lm-eval's index is read, which takes seconds
        near = difflib.get_close_matches(spec.name, OWN_TASKS, n=1, cutoff=0.85)
        if near and spec.name not in local:
            raise GenomeError(f"`tasks` names {spec.name!r}, which is no task; did you mean {near[0]}?")
    if not allow_benchmarks:
        for spec in genome.tasks:
            _refuse_benchmarks(spec.name, {spec.name} - local.keys())
    if all(spec.name in local for spec in genome.tasks) and not any(
        outside(spec.name, local) for spec in genome.tasks
    ):
        index: Mapping[str, Any] = local
    else:
        index = task_manager(genome).task_index
    for spec in genome.tasks:
        if spec.name not in index:
            raise GenomeError(_unknown(spec.name, index, genome))
        if not allow_benchmarks:
            _refuse_benchmarks(spec.name, set(leaves(spec.name, index)) - local.keys())
        _check_metric(spec, index)


def check_folders(genome: Genome) -> None:
    """Raise GenomeError unless every folder of `evaluate.task_path` is there."""
    for folder in genome.evaluate.task_path:
        if not Path(folder).expanduser().is_dir():
            raise GenomeError(f"`evaluate.task_path` must name folders, but {folder!r} is not one.")


def local_index(genome: Genome) -> dict[str, Any]:
    """lm-eval's index entry of every task, group and tag in `evaluate.task_path`, by name."""
    if not genome.evaluate.task_path:
        return {}
    return dict(_manager(genome, include_defaults=False).task_index)


def task_manager(genome: Genome) -> Any:
    """An lm-eval TaskManager that knows the genome's tasks.

    Reading lm-eval's own 14,000 task files takes some five seconds, so they are left out if the genome does
    not need them.
    """
    check_folders(genome)
    local = local_index(genome)
    names = [spec.name for spec in genome.tasks]
    needed = any(name not in local or outside(name, local) for name in names)
    return _manager(genome, include_defaults=needed)


def _manager(genome: Genome, include_defaults: bool) -> Any:
    from lm_eval.tasks import TaskManager

    folders = [Path(folder).expanduser() for folder in genome.evaluate.task_path]
    return TaskManager(include_path=folders or None, include_defaults=include_defaults)


def outside(name: str, index: Mapping[str, Any]) -> list[str]:
    """What `name` groups, at any depth, that `index` does not have."""
    return [leaf for leaf in leaves(name, index) if leaf not in index]


def leaves(name: str, index: Mapping[str, Any], seen: frozenset[str] = frozenset()) -> Iterator[str]:
    """Names of the tasks that `name` stands for: itself, or what a group or tag holds at any depth."""
    entry: Any = index.get(name)
    kind = "TASK" if entry is None else entry.kind.name
    if name in seen or kind not in ("GROUP", "TAG"):
        yield name
        return
    members = sorted(entry.tags) if kind == "TAG" else _members((entry.cfg or {}).get("task"))
    for member in members:
        yield from leaves(member, index, seen | {name})


def _members(listed: object) -> Iterator[str]:
    """Names in the `task:` list of a group, inline groups included."""
    for item in listed if isinstance(listed, list) else [listed]:
        if isinstance(item, str):
            yield item
        elif isinstance(item, dict) and "group" in item and isinstance(item.get("task"), list):
            yield from _members(item["task"])
        elif isinstance(item, dict):
            yield str(item.get("task", item.get("group")))


def _refuse_benchmarks(name: str, tasks: set[str]) -> None:
    for task in sorted(tasks):
        if task.startswith(BENCHMARKS) and not task.endswith("_train"):
            what = name if task == name else f"{name} (which holds {task})"
            raise GenomeError(
                f"`tasks` names {what}, a public benchmark that lm-eval scores on its test or validation "
                "split: a model tuned on it would have a score that means nothing. Use a task of your own "
                "(`evaluate.task_path`) or the benchmark's training split, or pass --allow-benchmark-tasks."
            )


def _unknown(name: str, index: Mapping[str, Any], genome: Genome) -> str:
    near = difflib.get_close_matches(name, index, n=3, cutoff=0.5)
    hint = f"did you mean {', '.join(near)}?" if near else "lm-eval has no task of a similar name."
    message = f"`tasks` names {name!r}, which lm-eval does not know; {hint}"
    if not genome.evaluate.task_path:
        return f"{message} A task of your own needs its folder in `evaluate.task_path`."
    broken = _broken_files(genome)
    return f"{message} These files of `evaluate.task_path` cannot be read: {broken}." if broken else message


def _broken_files(genome: Genome) -> str:
    """The local YAML files that lm-eval's index passes over in silence, each with the reason."""
    from lm_eval.tasks._yaml_loader import load_yaml  # as the index reads them: functions stay names

    reasons = []
    for folder in genome.evaluate.task_path:
        for path in sorted(Path(folder).expanduser().glob("**/*.yaml")):
            try:
                load_yaml(path, resolve_func=False)
            except Exception as error:  # whatever the index swallowed is what the user needs to read
                reasons.append(f"{path.name} ({' '.join(str(error).split())})")
    return "; ".join(reasons)


def split_metric(metric: str) -> tuple[str, str]:
    """`metric,filter` as lm-eval prints it, in its two parts; a metric alone means the filter `none`."""
    name, _, filter_name = metric.partition(",")
    return name, filter_name or "none"


def _check_metric(spec: TaskSpec, index: Mapping[str, Any]) -> None:
    entry = index[spec.name]
    if entry.kind.name == "TAG":
        tasks = ", ".join(sorted(entry.tags)[:5])
        raise GenomeError(
            f"`tasks` names {spec.name!r}, a tag without a score of its own; name its tasks: {tasks}."
        )
    if entry.kind.name == "GROUP":
        aggregated = [a.get("metric") for a in _as_list((entry.cfg or {}).get("aggregate_metric_list"))]
        if split_metric(spec.metric)[0] not in aggregated:
            have = ", ".join(map(str, aggregated)) or "none"
            raise GenomeError(
                f"`tasks` asks the group {spec.name!r} for {spec.metric!r}, but it aggregates {have}; "
                "use one of these, or name the group's tasks."
            )
        return
    names, filters, is_open = known_metrics(entry.cfg or {})
    name, filter_name = split_metric(spec.metric)
    if filter_name not in filters or (name not in names and not is_open):
        have = ", ".join(f"{metric},{known}" for metric in names for known in filters)
        raise GenomeError(f"`tasks` asks {spec.name!r} for {spec.metric!r}, but this task has {have}.")


def _as_list(value: object) -> list[Any]:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def known_metrics(config: Mapping[str, Any]) -> tuple[list[str], list[str], bool]:
    """Metrics and filters of a task's configuration, and whether it may report more than it lists.

    Python tasks, and those whose `process_results` or metric is a function, say what they report only when
    they run.
    """
    from lm_eval.api.registry import DEFAULT_METRIC_REGISTRY

    output_type = config.get("output_type", "generate_until")
    listed = config.get("metric_list")
    if listed is None:
        names = list(DEFAULT_METRIC_REGISTRY.get(output_type, ()))
    else:
        # A `!function` stands in the index as a path; the metric has the function's name.
        names = [str(metric["metric"]).rsplit("/", 1)[-1].rsplit(".", 1)[-1] for metric in listed]
    functions = any(m.get("hf_evaluate") or "/" in str(m["metric"]) for m in listed or ())
    is_open = "class" in config or "process_results" in config or functions
    if output_type == "multiple_choice":
        names += [name for name in GOLD_METRICS if name not in names]
    filters = [chain["name"] for chain in _as_list(config.get("filter_list"))] or ["none"]
    return names, filters, is_open
