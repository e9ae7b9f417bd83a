"""The evaluation plan: tasks, prompts and tokens, made once and the same for every trial.

lm-eval renders prompts, draws few-shot examples and tokenises on every call. Here this happens once, so that
all trials see identical tokens in an identical order: differences between trials are paired, and a trial pays
for little but the forward passes.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, final

from llmevo.errors import GenomeError
from llmevo.evaluate.items import draw_items, rung_sizes
from llmevo.evaluate.parts import Part, parts_of
from llmevo.evaluate.tasks import task_manager
from llmevo.evaluate.templates import compiled_once

if TYPE_CHECKING:
    from llmevo.evaluate.packing import Packing
    from llmevo.genome import Genome
    from llmevo.trial import Split

SPLITS: tuple[Split, Split] = ("search", "holdout")

_FEWSHOT_SEED = 1234  # lm-eval's own default, so that the prompts are those of `lm_eval`
_SHOWN = 40  # characters of a prompt or an answer in an error


@final
@dataclass(slots=True)
class Requests:
    """What one forward sweep answers: all requests of one type in a segment, over all tasks.

    Args:
        kind: `loglikelihood`, `loglikelihood_rolling` or `generate_until`.
        instances: lm-eval's instances, each as often as it is repeated.
        tokens: Requests as `_loglikelihood_tokens` takes them; empty for `generate_until`.
        owners: Index of the instance of each entry of `tokens`.
        packing: How `tokens` are computed; None where lm-eval does that by itself.
    """

    kind: str
    instances: list[Any]
    tokens: list[tuple[Any, list[int], list[int]]] = field(default_factory=list)
    owners: list[int] = field(default_factory=list)
    packing: Packing | None = None


@final
@dataclass(slots=True)
class Segment:
    """The items by which one rung extends the last: answered together, and kept together.

    Its requests are batched by themselves, so that an answer does not depend on which other segments were
    answered before.

    Args:
        documents: For each task, each item's instances, in stored order.
        requests: What to run.
        fingerprint: SHA-256 of the requests.
    """

    documents: dict[str, list[list[Any]]]
    requests: list[Requests]
    fingerprint: str

    @property
    def items(self) -> int:
        """Items over all tasks."""
        return sum(map(len, self.documents.values()))


@final
@dataclass(slots=True)
class Plan:
    """Everything about an evaluation that does not depend on the weights.

    Args:
        tasks: lm-eval's task by name.
        parts: Terms of the score.
        order: For each split and task, the items' numbers in lm-eval's data set, in stored order.
        segments: For each split, its items in the parts in which they are asked.
        rungs: Items by task of each rung of the search, each rung a prefix of the next; the last has all.
        chat_template: Whether prompts go through the tokenizer's chat template.
        batch_size: Requests per forward pass.
    """

    tasks: dict[str, Any]
    parts: list[Part]
    order: dict[Split, dict[str, list[int]]]
    segments: dict[Split, list[Segment]]
    rungs: list[dict[str, int]]
    chat_template: bool
    batch_size: int

    def requests(self, split: Split) -> list[Requests]:
        """All requests of a split, segment by segment."""
        return [requests for segment in self.segments[split] for requests in segment.requests]

    def items(self, split: Split) -> dict[str, list[list[Any]]]:
        """For each task, the instances of each item of a split, in stored order."""
        segments = self.segments[split]
        return {name: [row for segment in segments for row in segment.documents[name]] for name in self.tasks}


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
    sizes = {name: len(order["search"][name]) for name in tasks}
    rungs = rung_sizes(genome.search.halving, sizes)
    held = {name: len(order["holdout"][name]) for name in tasks}
    segments: dict[Split, list[Segment]] = {
        "search": _segments(lm, documents["search"], rungs),
        "holdout": _segments(lm, documents["holdout"], [held]),
    }
    parts = parts_of(genome, tasks, groups, sizes)
    return Plan(tasks, parts, order, segments, rungs, templated, lm.batch_size)


def _segments(lm: Any, documents: dict[str, list[list[Any]]], rungs: list[dict[str, int]]) -> list[Segment]:
    """What each rung adds to the last."""
    segments = []
    before = dict.fromkeys(documents, 0)
    for rung in rungs:
        added = {name: rows[before[name] : rung[name]] for name, rows in documents.items()}
        requests = _requests(lm, added)
        segments.append(Segment(added, requests, _fingerprint(requests)))
        before = rung
    return segments


def _render(genome: Genome, lm: Any, task: Any, items: list[int], templated: bool) -> dict[int, list[Any]]:
    """Instances of each item, sorted by lm-eval's `idx`.

    Raises:
        GenomeError: The task fails on an item, or asks nothing for one.
    """
    multiturn = genome.fewshot_as_multiturn
    chosen = sorted(items)
    with quiet(), compiled_once(), _unrendered(task):
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
    for item, instances in rendered.items():
        if not instances:
            raise GenomeError(
                f"`tasks` names {task.config.task!r}, which asks nothing about its item {item} (counted from "
                "0); give that item choices, or remove it."
            )
        instances.sort(key=lambda instance: instance.idx)
    return rendered


@contextlib.contextmanager
def _unrendered(task: Any) -> Iterator[None]:
    """Whatever a task's templates and functions raise for an item, as an error of the genome."""
    try:
        yield
    except Exception as error:  # the task's own code
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        shots = task.get_config("num_fewshot")
        few = f" with {shots} few-shot examples" if shots else ""
        raise GenomeError(
            f"`tasks` names {task.config.task!r}, whose prompts cannot be made{few} ({reason}); mend the task"
            + (", or lower `num_fewshot`: it may have fewer of them." if shots else ".")
        ) from error


def _requests(lm: Any, documents: dict[str, list[list[Any]]]) -> list[Requests]:
    """The items' requests by type, tokenised.

    Raises:
        GenomeError: An answer has no tokens, or more than the model takes, which lm-eval cannot score.
    """
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
            starts = encoded[:1] == [lm.prefix_token_id]
            pair = (encoded[:1], encoded[1:]) if starts else ([lm.prefix_token_id], encoded)
        _check_answer(instance, len(pair[1]), lm.max_length)
        return [((context, continuation), *pair)]
    if instance.request_type == "loglikelihood_rolling":
        windows = get_rolling_token_windows(
            token_list=lm.tok_encode(instance.args[0]),
            prefix_token=lm.prefix_token_id,
            max_seq_len=lm.max_length,
            context_len=1,
        )
        return [(None, *make_disjoint_window(window)) for window in windows]
    if instance.request_type == "generate_until" and lm.backend == "causal":
        _check_generation(instance, lm)
    return []


def _check_answer(instance: Any, length: int, longest: int) -> None:
    """Refuse an answer for which lm-eval has no log-likelihood."""
    prompt, answer = instance.args
    shown = answer if len(answer) <= _SHOWN else f"{answer[:_SHOWN]}..."
    where = f"`tasks` names {instance.task_name!r}, where the answer {shown!r} to {prompt[-_SHOWN:]!r}"
    if not length:
        raise GenomeError(
            f"{where} has no token of its own: it is empty, or its letters are in the prompt's last token; "
            "change the item, or the task's `target_delimiter`."
        )
    if length > longest:
        raise GenomeError(
            f"{where} has {length} tokens, and the model takes {longest}; shorten it, or raise "
            "`evaluate.max_length`, if it is lower than what the model takes."
        )


def _check_generation(instance: Any, lm: Any) -> None:
    """Refuse a prompt to which lm-eval cannot generate an answer."""
    from lm_eval.models.utils import normalize_gen_kwargs

    prompt, options = instance.args
    if not prompt and not lm.tok_encode(prompt):
        raise GenomeError(
            f"`tasks` names {instance.task_name!r}, which has a prompt without any token, from which no "
            "model generates; change `doc_to_text`."
        )
    longest = normalize_gen_kwargs(dict(options), lm.max_gen_toks)["max_gen_toks"]
    if longest >= lm.max_length:
        raise GenomeError(
            f"`tasks` names {instance.task_name!r}, which generates up to {longest} tokens, and the model "
            f"takes {lm.max_length} together with the prompt; lower `max_gen_toks` in its "
            "`generation_kwargs`, or raise `evaluate.max_length`, if it is lower than what the model takes."
        )


def _fingerprint(requests: list[Requests]) -> str:
    digest = hashlib.sha256()
    for sweep in requests:
        for instance in sweep.instances:
            digest.update(repr((sweep.kind, instance.task_name, instance.args)).encode())
        digest.update(repr([tokens[1:] for tokens in sweep.tokens]).encode())
    return digest.hexdigest()


def fingerprint(plan: Plan) -> str:
    """SHA-256 of every request in every split, so that a resumed run can tell whether its prompts changed."""
    parts = [(split, segment.fingerprint) for split in SPLITS for segment in plan.segments[split]]
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def documents(plan: Plan) -> str:
    """SHA-256 of every item as the task has it: right answers, which no prompt shows, are in it."""
    digest = hashlib.sha256()
    for split in SPLITS:
        for name, rows in plan.items(split).items():
            docs = [row[0].doc for row in rows]
            told = json.dumps([split, name, docs], sort_keys=True, default=lambda other: type(other).__name__)
            digest.update(told.encode())
    return digest.hexdigest()
