"""The terms of the score: which metric of which task, with which weight and sign."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

from llmevo.errors import GenomeError
from llmevo.evaluate.measures import sign
from llmevo.evaluate.tasks import GOLD_METRICS, split_metric

if TYPE_CHECKING:
    from llmevo.genome import Genome


@final
@dataclass(frozen=True, slots=True)
class Part:
    """One term of the score.

    Args:
        key: Its name in `Score.items`: the task, or `task/metric` where a task has several terms.
        task: lm-eval's name of the task.
        metric: Metric without its filter.
        filter: Name of lm-eval's filter chain.
        weight: The genome's |weight|, times the task's share if the genome names its group.
        sign: +1 or -1, see `measures.sign`.
    """

    key: str
    task: str
    metric: str
    filter: str
    weight: float
    sign: int


def parts_of(
    genome: Genome, tasks: dict[str, Any], groups: dict[str, Any], sizes: dict[str, int]
) -> list[Part]:
    """The terms of the score, with groups spread over their tasks as lm-eval averages them."""
    terms: list[tuple[str, str, float]] = []
    for spec in genome.tasks:
        if spec.name in groups:
            shares = _shares(groups[spec.name], spec.metric, sizes)
            terms += [(name, spec.metric, spec.weight * share) for name, share in shares.items()]
        else:
            terms.append((spec.name, spec.metric, spec.weight))
    names = [name for name, _, _ in terms]
    parts = []
    for name, full_metric, weight in terms:
        metric, filter_name = split_metric(full_metric)
        key = name if names.count(name) == 1 else f"{name}/{full_metric}"
        higher = True if metric in GOLD_METRICS else tasks[name].higher_is_better().get(metric, True)
        direction = genome.search.direction
        parts.append(Part(key, name, metric, filter_name, abs(weight), sign(weight, higher, direction)))
    return parts


def _shares(group: Any, full_metric: str, sizes: dict[str, int]) -> dict[str, float]:
    """Each task's share in a group's mean of a metric: by size or equal, as the group says."""
    metric, _ = split_metric(full_metric)
    names = [task.task_name for task in group.get_all_tasks()]
    for aggregated in group.aggregate_metric_list or []:
        if aggregated.metric == metric:
            weights = {name: sizes[name] if aggregated.weight_by_size else 1 for name in names}
            total = sum(weights.values())
            return {name: weight / total for name, weight in weights.items()}
    raise GenomeError(
        f"`tasks` asks the group {group.name!r} for {full_metric!r}, which it does not aggregate; "
        "name its tasks."
    )
