"""lm-eval's HFLM on the resident model: faster where that changes nothing, and telling what it does not tell.

Imported only where torch and lm-eval are in use already.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias, TypeVar, final

import lm_eval
import torch
import transformers
from lm_eval.api.model import CacheHook
from lm_eval.models.huggingface import HFLM
from transformers import StoppingCriteria, StoppingCriteriaList

from llmevo.attention import NotPackable
from llmevo.evaluate.hardware import free_memory
from llmevo.evaluate.packed import PackedModel
from llmevo.evaluate.packing import Packing

Tokens: TypeAlias = tuple[Any, list[int], list[int]]
"""A request as `_loglikelihood_tokens` takes it: anything, the context, the continuation."""
_Answers = TypeVar("_Answers")

# How far packed and plain log-probabilities of one token may be apart; lm-eval takes the log-softmax of a
# half-precision model in half precision, which alone moves them by a few hundredths.
_ALLOWED, _ALLOWED_HALF = 1e-3, 0.1
_ABOUT = ("transformers_version", "dtype", "architectures")  # entries of a configuration that compute nothing
_LOOK_BACK = 2  # tokens beyond a stop's own that may hold it in another tokenisation; as lm-eval looks


@final
class ResidentLM(HFLM):  # type: ignore[misc]
    """HFLM with log-likelihoods from packed tokens, and generations that stop row by row.

    Args:
        reference: Whether everything that HFLM computes is computed by HFLM.
        options: What HFLM takes.

    Attributes:
        why_not: Why HFLM computes log-likelihoods, or some of them; None while all are packed.
    """

    def __init__(self, *, reference: bool = False, **options: Any) -> None:
        super().__init__(**options)
        self._reference = reference
        self._rows: list[bool] = []
        self._halved = 0
        self.why_not: str | None = "`evaluate.reference` is true" if reference else None
        self._packed: PackedModel | None = None
        if not reference:
            try:
                self._packed = PackedModel(self.model, self.max_length)
            except NotPackable as error:
                self.why_not = str(error)

    def check(self, requests: Sequence[Tokens]) -> None:
        """Compare packed answers with HFLM's, and leave log-likelihoods to HFLM if they differ.

        Args:
            requests: Some of the requests that are to be answered.
        """
        if self._packed is None or not requests:
            return
        try:
            packed = self._packed.answer(self._packed.pack(requests))
        except NotPackable as error:
            self._give_up(str(error))
            return
        except Exception as error:  # whatever a model's own code says to packed tokens
            self._give_up(" ".join(f"{type(error).__name__}: {error}".split()))
            return
        own = self._plain(list(requests), disable_tqdm=True)
        allowed = _ALLOWED if self.model.dtype == torch.float32 else _ALLOWED_HALF
        for request, (mine, _), (theirs, _) in zip(requests, packed, own, strict=True):
            if not abs(mine - theirs) <= allowed * len(request[2]):
                self._give_up(f"packed and plain log-likelihoods differ, {mine:.4f} and {theirs:.4f}")
                return

    def _give_up(self, reason: str) -> None:
        self.why_not = reason
        self._packed = None

    def pack(self, requests: Sequence[Tokens]) -> Packing | None:
        """A plan for answering `requests`; None where HFLM answers them itself."""
        if self._packed is None or any(
            not context or not 0 < len(continuation) <= self.max_length
            for _, context, continuation in requests
        ):
            return None
        try:
            return self._packed.pack(requests)
        except NotPackable as error:
            self.why_not = str(error)
            return None

    def answer(self, packing: Packing) -> list[tuple[float, bool]]:
        """The log-likelihood of each continuation, in nats, and whether it is the greedy one."""
        if self._packed is None:
            raise RuntimeError(f"this model is not packed: {self.why_not}.")
        return self._packed.answer(packing)

    def _loglikelihood_tokens(
        self, requests: list[Tokens], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """HFLM's, packed where the model allows it: lm-eval's own evaluator can use this class too."""
        packing = self.pack(requests) if requests else None
        if packing is not None:
            return self.answer(packing)
        return self._plain(requests, disable_tqdm=disable_tqdm, override_bs=override_bs)

    def _plain(self, requests: list[Tokens], **options: Any) -> list[tuple[float, bool]]:
        """HFLM's own."""
        ask = super()._loglikelihood_tokens
        answers: list[tuple[float, bool]] = self._fitting(lambda: ask(requests, **options))
        return answers

    def _fitting(self, ask: Callable[[], _Answers]) -> _Answers:
        """What `ask` returns; while the accelerator's memory is too small, half of HFLM's batch size.

        Raises:
            torch.OutOfMemoryError: It does not suffice for a batch of one.
        """
        before = self.batch_size
        while True:
            try:
                return ask()
            except torch.OutOfMemoryError:
                if self.batch_size < 2:
                    self.batch_size_per_gpu = before  # smaller batches do not help
                    raise
            self.batch_size_per_gpu = self.batch_size // 2
            self._halved += 1
            free_memory()

    @property
    def halved(self) -> int:
        """How often batches were halved since one did not fit into the accelerator's memory."""
        return self._halved + (0 if self._packed is None else self._packed.halved)

    def settings(self) -> str:
        """What answers depend on beside weights and requests, as one line."""
        config = self.model.config
        facts = {
            "reference": self._reference,
            "packed": None if self._packed is None else self._packed.settings(),
            "device": self.device.type,
            "dtype": str(self.model.dtype),
            "batch_size": self.batch_size,
            "max_length": self.max_length,
            "attention": config._attn_implementation,
            # The same weights answer otherwise with other positions or norms, or other rules of generation.
            "configuration": _digest(config.to_dict(), self.model.generation_config.to_dict()),
            "tokens": [self.tokenizer.pad_token_id, self.eot_token_id, self.prefix_token_id],
            "tokenizer": _digest(_rules(self.tokenizer)),
            "versions": [torch.__version__, transformers.__version__, lm_eval.__version__],
        }
        return json.dumps(facts, sort_keys=True)

    def generate(self, instances: Sequence[Any]) -> tuple[list[str], list[bool]]:
        """`generate_until`, and for each answer whether it ran into `max_gen_toks` without a stop."""
        return self._fitting(lambda: self._generate(instances))

    def _generate(self, instances: Sequence[Any]) -> tuple[list[str], list[bool]]:
        self._rows.clear()
        hook = _Order()
        self.set_cache_hook(hook)
        try:
            texts: list[str] = self.generate_until(list(instances), disable_tqdm=True)
        finally:
            self.set_cache_hook(CacheHook(None))
        # HFLM answers in an order of its own, which only its hook tells.
        by_request: dict[str, list[bool]] = defaultdict(list)
        for request, cut in zip(hook.requests, self._rows, strict=True):
            by_request[request].append(cut)
        return texts, [by_request[_name(instance.args)].pop(0) for instance in instances]

    def _model_generate(
        self, context: torch.Tensor, max_length: int, stop: list[str], **generation_kwargs: Any
    ) -> torch.Tensor:
        """HFLM's, but a row that has met any of its stops is done, whatever stops the others meet."""
        stops = [text for text in stop if text]
        start = context.shape[1]
        if self.backend == "seq2seq":  # a decoder begins with one token of its own, not with the context
            start, max_length = 1, 1 + max_length - start
        tokens: torch.Tensor
        if self._reference:
            tokens = super()._model_generate(context, max_length, stop, **generation_kwargs)
        else:
            # HFLM's rule: with a temperature of 0, or none, decoding is greedy if the task does not say.
            temperature = generation_kwargs.pop("temperature", 0.0)
            if temperature == 0.0 and generation_kwargs.get("do_sample") is None:
                generation_kwargs["do_sample"] = False
            if temperature != 0.0 or generation_kwargs["do_sample"]:
                generation_kwargs["temperature"] = temperature
            tokens = self.model.generate(
                input_ids=context,
                max_length=max_length,
                stopping_criteria=StoppingCriteriaList([_Stops(stops, self.tokenizer, start)]),
                pad_token_id=self.tokenizer.pad_token_id,
                use_cache=True,
                **generation_kwargs,
            )
        self._rows += self._cut_rows(tokens[:, start:], stops, max_length - start)
        return tokens

    def _cut_rows(self, generated: torch.Tensor, stops: list[str], longest: int) -> list[bool]:
        """Which rows are as long as allowed and hold neither a stop nor an end of text."""
        if generated.shape[1] < longest:
            return [False] * len(generated)
        ends = self.model.generation_config.eos_token_id
        ends = {self.eot_token_id, *(ends if isinstance(ends, list) else [ends])}
        texts = self.tokenizer.batch_decode(generated)
        return [
            ends.isdisjoint(row) and not any(stop in text for stop in stops)
            for row, text in zip(generated.tolist(), texts, strict=True)
        ]


@final
class _Stops(StoppingCriteria):  # type: ignore[misc]
    """Done, row by row, once the last tokens hold a stop."""

    def __init__(self, stops: list[str], tokenizer: Any, start: int) -> None:
        self._stops = stops
        self._tokenizer = tokenizer
        self._start = start
        lengths = [len(tokenizer.encode(stop, add_special_tokens=False)) for stop in stops]
        self._look_back = max(lengths, default=0) + _LOOK_BACK

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        recent = input_ids[:, self._start :][:, -self._look_back :]
        texts = self._tokenizer.batch_decode(recent)
        done = [any(stop in text for stop in self._stops) for text in texts]
        return torch.tensor(done, dtype=torch.bool, device=input_ids.device)


@final
class _Order(CacheHook):  # type: ignore[misc]
    """Notes the order in which HFLM answers."""

    def __init__(self) -> None:
        super().__init__(None)
        self.requests: list[str] = []

    def add_partial(self, attr: str, req: Iterable[Any], res: Any) -> None:
        self.requests.append(_name(req))


def _rules(tokenizer: Any) -> dict[str, Any]:
    """How a tokenizer cuts and joins text, without how it was last told to fill up rows."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return {"vocabulary": tokenizer.get_vocab()}
    rules: dict[str, Any] = json.loads(backend.to_str())
    return {key: rule for key, rule in rules.items() if key not in ("padding", "truncation")}


def _digest(*configurations: dict[str, Any]) -> str:
    """A hash of what configurations say about computing, not of where and with what they were written."""
    said = [{k: v for k, v in c.items() if not k.startswith("_") and k not in _ABOUT} for c in configurations]
    return hashlib.sha256(json.dumps(said, sort_keys=True, default=str).encode()).hexdigest()


def _name(request: Iterable[Any]) -> str:
    context, options = request
    return repr((context, sorted(options.items(), key=str)))
