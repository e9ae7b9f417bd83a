"""The evaluation plan: tasks, prompts and tokens, made once and the same for every trial.

lm-eval renders prompts, draws few-shot examples and tokenises on every call. Here this happens once, so that
all trials see identical tokens in an identical order: differences between trials are paired, and a trial pays
for little but the forward passes.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, final

import numpy as np

from llmevo.errors import GenomeError
from llmevo.evaluate.measures import sign
from llmevo.evaluate.tasks import GOLD_METRICS, split_metric, task_manager

if TYPE_CHECKING:
    from llmevo.genome import Genome
    from llmevo.trial import Split

SPLITS: tuple[Split, Split] = ("search", "holdout")

_FEWSHOT_SEED = 1234  # lm-eval's own default, so that the prompts are those of `lm_eval`


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


@final
@dataclass(slots=True)
class Requests:
    """What one forward sweep answers: all requests of one type in a split, over all tasks.

    Args:
        kind: `loglikelihood`, `loglikelihood_rolling` or `generate_until`.
        instances: lm-eval's instances, each as often as it is repeated.
        tokens: Requests as `_loglikelihood_tokens` takes them; empty for `generate_until`.
        owners: Index of the instance of each entry of `tokens`.
    """

    kind: str
    instances: list[Any]
    tokens: list[tuple[Any, list[int], list[int]]] = field(default_factory=list)
    owners: list[int] = field(default_factory=list)


@final
@dataclass(slots=True)
class Plan:
    """Everything about an evaluation that does not depend on the weights.

    Args:
        tasks: lm-eval's task by name.
        parts: Terms of the score.
        order: For each split and task, the items' numbers in lm-eval's data set, in stored order.
        documents: For each split and task, each item's instances, in stored order.
        requests: For each split, what to run.
        chat_template: Whether prompts go through the tokenizer's chat template.
        batch_size: Requests per forward pass.
    """

    tasks: dict[str, Any]
    parts: list[Part]
    order: dict[Split, dict[str, list[int]]]
    documents: dict[Split, dict[str, list[list[Any]]]]
    requests: dict[Split, list[Requests]]
    chat_template: bool
    batch_size: int


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep lm-eval's progress bars, notes and warnings, which repeat on every trial, off the terminal."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
            # scikit-learn, for one, warns where all answers of a leave-one-out are alike.
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def load_tasks(genome: Genome) -> tuple[dict[str, Any], dict[str, Any]]:
    """lm-eval's tasks, ready to render, and groups, by name.

    Few-shot numbers follow lm-eval's rule: `num_fewshot` does not overrule a task that says 0.

    Raises:
        GenomeError: A task does not load, runs generated code, or needs more than text.
    """
    manager = task_manager(genome)
    names = list(dict.fromkeys(spec.name for spec in genome.tasks))
    try:
        loaded = manager.load(names)
    except Exception as error:  # a task's YAML, its data set or its own code: all of it is the genome's
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise GenomeError(f"`tasks` cannot be loaded ({', '.join(names)}): {reason}") from error
    tasks: dict[str, Any] = dict(loaded["tasks"])
    for name, task in tasks.items():
        if getattr(task, "UNSAFE_CODE", False):
            raise GenomeError(
                f"`tasks` names {name!r}, which runs code that the model writes; llmevo does not."
            )
        if getattr(task, "MULTIMODAL", False):
            raise GenomeError(f"`tasks` names {name!r}, which needs images or sound; llmevo evaluates text.")
        shots = task.get_config("num_fewshot")
        if genome.num_fewshot is not None and shots != 0:
            shots = genome.num_fewshot
        task.set_config("num_fewshot", shots or 0)
        task.set_fewshot_seed(_FEWSHOT_SEED)
    return tasks, dict(loaded.get("groups") or {})


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


def use_chat_template(genome: Genome, tokenizer: Any) -> bool:
    """Whether prompts go through the chat template: as the genome says, else if the tokenizer has one.

    Raises:
        GenomeError: The genome asks for a template, or for few-shot turns, which the tokenizer cannot give.
    """
    has = bool(getattr(tokenizer, "chat_template", None))
    if genome.apply_chat_template and not has:
        raise GenomeError(
            "`apply_chat_template` is true, but the tokenizer has no chat template; set it to false."
        )
    used = has if genome.apply_chat_template is None else genome.apply_chat_template
    if genome.fewshot_as_multiturn and not used:
        raise GenomeError("`fewshot_as_multiturn` is true, but no chat template is applied; set it to false.")
    return used


def build_plan(genome: Genome, lm: Any) -> Plan:
    """Load, draw, render and tokenise.

    Args:
        genome: The genome.
        lm: lm-eval's HFLM on the resident model, for its tokenizer and lengths.

    Raises:
        GenomeError: A task cannot be loaded or rendered, or does not have the metric.
    """
    tasks, groups = load_tasks(genome)
    templated = use_chat_template(genome, lm.tokenizer)
    order: dict[Split, dict[str, list[int]]] = {"search": {}, "holdout": {}}
    documents: dict[Split, dict[str, list[list[Any]]]] = {"search": {}, "holdout": {}}
    for name, task in tasks.items():
        items = draw_items(genome, name, len(task.eval_docs))
        rendered = _render(genome, lm, task, items["search"] + items["holdout"], templated)
        for split in SPLITS:
            order[split][name] = items[split]
            documents[split][name] = [rendered[item] for item in items[split]]
    requests = {split: _requests(lm, documents[split]) for split in SPLITS}
    sizes = {name: len(order["search"][name]) for name in tasks}
    parts = _parts(genome, tasks, groups, sizes)
    return Plan(tasks, parts, order, documents, requests, templated, lm.batch_size)


def _render(genome: Genome, lm: Any, task: Any, items: list[int], templated: bool) -> dict[int, list[Any]]:
    """Instances of each item, sorted by lm-eval's `idx`."""
    multiturn = genome.fewshot_as_multiturn
    chosen = sorted(items)
    with quiet():
        # lm-eval visits the data set in its own order and numbers what it keeps 0, 1, ...; a set makes its
        # membership test cheap.
        task.build_all_requests(
            samples=set(chosen),
            rank=0,
            world_size=1,
            apply_chat_template=templated,
            fewshot_as_multiturn=templated if multiturn is None else multiturn,
            chat_template=lm.apply_chat_template if templated else None,
            tokenizer_name=lm.tokenizer_name if templated else "",
        )
    rendered: dict[int, list[Any]] = {item: [] for item in chosen}
    for instance in task.instances:
        rendered[chosen[instance.doc_id]].append(instance)
    for instances in rendered.values():
        instances.sort(key=lambda instance: instance.idx)
    return rendered


def _requests(lm: Any, documents: dict[str, list[list[Any]]]) -> list[Requests]:
    """The split's requests by type, tokenised."""
    by_kind: dict[str, Requests] = {}
    for rows in documents.values():
        # lm-eval's own order within a task, so that batches are composed as lm-eval composes them.
        for instances in sorted(rows, key=lambda row: row[0].doc_id):
            for instance in instances:
                kind = instance.request_type
                requests = by_kind.setdefault(kind, Requests(kind, []))
                requests.instances += [instance] * instance.repeats
    for requests in by_kind.values():
        for owner, instance in enumerate(requests.instances):
            for tokens in _tokens(lm, instance):
                requests.tokens.append(tokens)
                requests.owners.append(owner)
    return list(by_kind.values())


def _tokens(lm: Any, instance: Any) -> list[tuple[Any, list[int], list[int]]]:
    """What HFLM's `loglikelihood` and `loglikelihood_rolling` make of a request before the forward pass."""
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    if instance.request_type == "loglikelihood":
        context, continuation = instance.args
        if context:
            pair = lm._encode_pair(context, continuation)
        else:
            encoded = lm.tok_encode(continuation, add_special_tokens=False)
            starts = encoded[0] == lm.prefix_token_id
            pair = (encoded[:1], encoded[1:]) if starts else ([lm.prefix_token_id], encoded)
        return [((context, continuation), *pair)]
    if instance.request_type == "loglikelihood_rolling":
        windows = get_rolling_token_windows(
            token_list=lm.tok_encode(instance.args[0]),
            prefix_token=lm.prefix_token_id,
            max_seq_len=lm.max_length,
            context_len=1,
        )
        return [(None, *make_disjoint_window(window)) for window in windows]
    return []


def _parts(
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


def fingerprint(plan: Plan) -> str:
    """SHA-256 of every request in every split, so that a resumed run can tell whether its prompts changed."""
    digest = hashlib.sha256()
    for split in SPLITS:
        for requests in plan.requests[split]:
            for instance in requests.instances:
                digest.update(repr((split, requests.kind, instance.task_name, instance.args)).encode())
            digest.update(repr([tokens[1:] for tokens in requests.tokens]).encode())
    return digest.hexdigest()
