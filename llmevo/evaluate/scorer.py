"""The evaluator: runs the plan on the resident model and turns lm-eval's answers into a score.

The forward passes, filters, metrics and aggregations are lm-eval's own (HFLM and its Task classes), so that a
score here is the number that `lm_eval` prints for the same items and prompts.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, final

from llmevo.errors import StageError
from llmevo.evaluate.answers import Answers
from llmevo.evaluate.measures import gold, per_item
from llmevo.evaluate.parts import Part
from llmevo.evaluate.plan import SPLITS, Plan, Requests, Segment, build_plan, documents, fingerprint, quiet
from llmevo.evaluate.tasks import GOLD_METRICS
from llmevo.evaluate.templates import compiled_once
from llmevo.trial import Score, standard_error

if TYPE_CHECKING:
    import torch

    from llmevo.evaluate.cache import AnswerCache
    from llmevo.genome import Genome
    from llmevo.trial import Split

_Raw: TypeAlias = dict[tuple[str, str], list[Any]]  # by (metric, filter), in stored item order
_CPU_BATCH = 16
_CPU_BYTES = 2 << 30
_GPU_SHARE = 0.3


@final
class Evaluator:
    """Scores whatever weights the resident model holds.

    Tasks are loaded, prompts rendered and tokenised once, in the constructor. Each evaluation then runs the
    same requests in the same batches, so that scores of different weights are paired item by item, and the
    same weights score the same twice.

    `Score.items` hold what each item scored in each term (see `Part.key`), in stored order, and signed so
    that more is better in either direction: 0 and 1 for an accuracy, negative numbers for a perplexity.
    `Score.value` is the sum over the terms of `weight * mean(items)`, with the sign turned under `minimize`.

    Args:
        genome: The genome: tasks, limit, few-shot examples, direction, seed.
        model: The resident transformers model; its weights may change, its modules may not.
        tokenizer: The model's tokenizer.
        device: Where the model is.
        cache: Where answers are kept beyond this process; None for nowhere.

    Attributes:
        last: How many items the last evaluation `scored`, how many it had `cached`, and, if the accelerator's
            memory was too small, how often batches were `halved`; they stay smaller.

    Raises:
        GenomeError: A task cannot be loaded or lacks the metric, or the tokenizer lacks a chat template.
    """

    def __init__(
        self,
        genome: Genome,
        model: Any,
        tokenizer: Any,
        *,
        device: torch.device | str,
        cache: AnswerCache | None = None,
    ) -> None:
        import torch

        from llmevo.evaluate.lm import ResidentLM

        self.last = {"scored": 0, "cached": 0}
        spec = genome.evaluate
        self._device = torch.device(device)
        self._direction = genome.search.direction
        with quiet():
            self._lm = ResidentLM(
                reference=spec.reference,
                pretrained=model,
                tokenizer=tokenizer,
                batch_size=spec.batch_size or 1,
                max_length=spec.max_length,
            )
        self._plan: Plan = build_plan(genome, self._lm)
        if spec.batch_size is None:
            self._lm.batch_size_per_gpu = self._plan.batch_size = _batch_size(self._plan, model, self._device)
        with compiled_once():
            self._golds = {name: _golds(task, self._plan, name) for name, task in self._plan.tasks.items()}
        self._fingerprint, self._documents = fingerprint(self._plan), documents(self._plan)
        with quiet():
            self._lm.check(_sample(self._plan))
            for requests in self._likelihoods():
                requests.packing = self._lm.pack(requests.tokens)
        self._answers = Answers(self._lm, self._device, cache)

    def evaluate(
        self, split: Split, *, rung: int | None = None, weights: str | None = None
    ) -> tuple[Score, dict[str, dict[str, float]]]:
        """Score the model's weights as they are now.

        Args:
            split: `search`, or the items that the search never sees.
            rung: Score only the items up to this rung, an index into `describe()["rungs"]`; None for all.
            weights: The identity of the weights. Answers are kept under it, and those that are kept are not
                asked again; None to ask everything and keep nothing.

        Returns:
            The score, and every metric that lm-eval computes by task, named as lm-eval names them
            (`acc,none`). Multiple-choice tasks have `gold_logprob,none` and `gold_margin,none` besides;
            tasks that generate have the shares `truncated` (no stop within `max_gen_toks`) and `unparsed`
            (nothing left by the filter) for each filter.

        Raises:
            StageError: The split has no items, logits are not finite, or a metric fails or is not there.
        """
        segments = self._segments(split, rung)
        if not any(segment.requests for segment in segments):
            raise StageError(
                "evaluate", f"no items are in the split {split!r}; `evaluate.holdout` must be > 0."
            )
        self.last = {"scored": 0, "cached": 0}
        halved = self._lm.halved
        with quiet(), compiled_once():
            for segment in segments:
                asked = self._answers.give(segment, weights)
                self.last["scored" if asked else "cached"] += segment.items
            if self._lm.halved > halved:
                self.last["halved"] = self._lm.halved - halved
            raw = {}
            for name in self._plan.tasks:
                with _own_code(name):
                    rows = [row for segment in segments for row in segment.documents[name]]
                    raw[name] = self._raw(name, rows)
            metrics = {name: _aggregate(self._plan.tasks[name], values) for name, values in raw.items()}
            return self._score(raw, metrics), metrics

    def known(self, split: Split, rung: int | None, weights: str) -> bool:
        """Whether `evaluate` with these arguments needs no model: it may then hold any weights."""
        return all(self._answers.known(segment, weights) for segment in self._segments(split, rung))

    def _segments(self, split: Split, rung: int | None) -> list[Segment]:
        segments = self._plan.segments[split]
        if rung is None or split != "search":
            return segments
        if not 0 <= rung < len(segments):
            raise StageError("evaluate", f"`rung` must be within 0..{len(segments) - 1}, but got {rung}.")
        return segments[: rung + 1]

    def _score(self, raw: dict[str, _Raw], metrics: dict[str, dict[str, float]]) -> Score:
        """The sum over the terms, with its standard error and items."""
        items: dict[str, list[float]] = {}
        value = 0.0
        variance: float | None = 0.0
        for part in self._plan.parts:
            values = _values(part, raw[part.task])
            whole = metrics[part.task].get(f"{part.metric},{part.filter}", math.nan)
            if not math.isfinite(whole):
                raise StageError("evaluate", f"{part.metric},{part.filter} of {part.task} is not finite.")
            value += part.sign * part.weight * whole
            better = part.sign if self._direction == "maximize" else -part.sign
            scored = per_item(values, _aggregation(self._plan.tasks[part.task], part.metric))
            items[part.key] = [better * item for item in scored]
            error = standard_error(scored)
            known = variance is not None and error is not None and math.isfinite(error)
            variance = variance + (part.weight * error) ** 2 if known else None  # type: ignore[operator]
        return Score(value, None if variance is None else math.sqrt(variance), items)

    def describe(self) -> dict[str, Any]:
        """Facts for the run's record, as JSON.

        `items` by task and split, `weights` and `signs` by term of the score, `batch_size`, `chat_template`,
        `fewshot` by task, `truncated` requests by split, `rungs` (items by task that each rung of the search
        has, the last one all), `packed` (requests for log-likelihoods that are computed on shared
        tokens and those that are left to lm-eval, with the reason), `fingerprint`, which changes with any
        prompt, and `documents`, which changes with any item, its right answer included.
        """
        plan = self._plan
        longest = self._lm.max_length + 1
        return {
            "items": {name: {s: len(plan.order[s][name]) for s in SPLITS} for name in plan.tasks},
            "weights": {part.key: part.weight for part in plan.parts},
            "signs": {part.key: part.sign for part in plan.parts},
            "batch_size": self._lm.batch_size,
            "chat_template": plan.chat_template,
            "fewshot": {name: task.get_config("num_fewshot") for name, task in plan.tasks.items()},
            "truncated": {
                s: sum(len(t[1]) + len(t[2]) > longest for r in plan.requests(s) for t in r.tokens)
                for s in SPLITS
            },
            "rungs": [dict(rung) for rung in plan.rungs],
            "packed": self._packed(),
            "fingerprint": self._fingerprint,
            "documents": self._documents,
        }

    def _likelihoods(self) -> list[Requests]:
        return [r for split in SPLITS for r in self._plan.requests(split) if r.tokens]

    def _packed(self) -> dict[str, Any]:
        """How many requests for log-likelihoods are packed, what that saves, and why not all are."""
        sweeps = self._likelihoods()
        packings = [r.packing for r in sweeps if r.packing is not None]
        packed = sum(len(r.tokens) for r in sweeps if r.packing is not None)
        return {
            "requests": {"packed": packed, "plain": sum(len(r.tokens) for r in sweeps) - packed},
            "tokens": {
                "asked": sum(p.tokens for p in packings),
                "computed": sum(p.computed for p in packings),
            },
            "why_not": self._lm.why_not,
        }

    def _raw(self, name: str, rows: list[list[Any]]) -> _Raw:
        """Raw values by (metric, filter) of these items, in stored order."""
        task = self._plan.tasks[name]
        # Filters run over a task's instances, which are those of one evaluation at a time.
        task._instances = [instance for instances in rows for instance in instances]
        task.apply_filters()
        raw: _Raw = {}
        for instances in rows:
            for filter_name in instances[0].filtered_resps:
                responses = [instance.filtered_resps[filter_name] for instance in instances]
                for metric, value in task.process_results(instances[0].doc, responses).items():
                    raw.setdefault((metric, filter_name), []).append(value)
                if task.OUTPUT_TYPE == "generate_until":
                    cut = self._answers.cut(instances)
                    raw.setdefault(("truncated", filter_name), []).append(cut)
                    raw.setdefault(("unparsed", filter_name), []).append(_unparsed(responses))
            golds = self._golds[name].get(instances[0].doc_id)
            if golds is not None:
                likelihoods = [instance.resps[0][0] for instance in instances[: golds[1]]]
                for metric, value in gold(likelihoods, golds[0]).items():
                    raw.setdefault((metric, "none"), []).append(value)
        return raw


@contextlib.contextmanager
def _own_code(name: str) -> Iterator[None]:
    """Name the task whose filters or `process_results` fail."""
    try:
        yield
    except Exception as error:  # a task's functions may raise anything
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise StageError(
            "evaluate", f"the filters or `process_results` of {name} failed ({reason}); mend the task."
        ) from error


def _sample(plan: Plan) -> list[Any]:
    """The requests of two short items, and of one short text, for comparing packed and plain answers."""
    sample: list[Any] = []
    for requests in plan.segments["search"][0].requests:
        by_item: dict[tuple[str, int], list[Any]] = {}
        for tokens, owner in zip(requests.tokens, requests.owners, strict=True):
            instance = requests.instances[owner]
            by_item.setdefault((instance.task_name, instance.doc_id), []).append(tokens)
        items = sorted(by_item.values(), key=lambda item: sum(len(t[1]) + len(t[2]) for t in item))
        sample += [
            tokens for item in items[: 2 if requests.kind == "loglikelihood" else 1] for tokens in item
        ]
        if sample:
            break
    return sample


def _golds(task: Any, plan: Plan, name: str) -> dict[int, tuple[list[int], int]]:
    """For each document of a multiple-choice task, the right choices and the number of choices."""
    if task.OUTPUT_TYPE != "multiple_choice":
        return {}
    golds = {}
    for split in SPLITS:
        for instances in plan.items(split)[name]:
            doc = instances[0].doc
            choices = task.doc_to_choice(doc)
            right = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
            listed = right if isinstance(right, list) else [right]
            indices = [choices.index(g) if isinstance(g, str) and g in choices else g for g in listed]
            valid = [g for g in indices if isinstance(g, int) and 0 <= g < len(choices)]
            if valid:
                golds[instances[0].doc_id] = (valid, len(choices))
    return golds


def _unparsed(responses: Sequence[Any]) -> float:
    """1 where a filter left nothing of an answer, or what lm-eval's regex filters put for no match."""
    firsts = [r[0] if isinstance(r, (list, tuple)) and r else r for r in responses]
    return float(any(not isinstance(r, str) or r.strip() in ("", "[invalid]") for r in firsts))


def _aggregation(task: Any, metric: str) -> Callable[[Sequence[Any]], float]:
    """lm-eval's aggregation of a metric; the mean where the task names none, as in lm-eval."""
    from lm_eval.api.metrics import mean

    chosen: Callable[[Sequence[Any]], float] = (
        mean if metric in GOLD_METRICS else task.aggregation().get(metric, mean)
    )
    return chosen


def _aggregate(task: Any, raw: _Raw) -> dict[str, float]:
    """Every metric of one task that has a number, by lm-eval's name for it."""
    metrics = {}
    for (metric, filter_name), values in raw.items():
        with contextlib.suppress(ArithmeticError, TypeError, ValueError):
            number = float(_aggregation(task, metric)(values))
            if math.isfinite(number):
                metrics[f"{metric},{filter_name}"] = number
    return metrics


def _values(part: Part, raw: _Raw) -> list[Any]:
    try:
        return raw[part.metric, part.filter]
    except KeyError:
        have = ", ".join(f"{metric},{filter_name}" for metric, filter_name in raw)
        reason = f"{part.task} did not report {part.metric},{part.filter}; it reported {have}."
        raise StageError("evaluate", reason) from None


def _batch_size(plan: Plan, model: Any, device: torch.device) -> int:
    """Requests per forward pass, a power of two: as many as the logits of the longest request leave room for.

    HFLM keeps the logits of every position and their log-softmax: about `tokens * vocabulary * 8` bytes a
    request. On a CPU more than 16 gains nothing.
    """
    import torch

    lengths = [len(t[1]) + len(t[2]) for split in SPLITS for r in plan.requests(split) for t in r.tokens]
    one = max(lengths, default=1) * model.config.get_text_config().vocab_size * 8
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        room, most = int(free * _GPU_SHARE), 256
    else:
        room, most = _CPU_BYTES, _CPU_BATCH
    size = 1
    while size < most and 2 * size * one <= room:
        size *= 2
    return size
