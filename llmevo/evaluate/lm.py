"""lm-eval's HFLM on the resident model, with what lm-eval does not tell.

Imported only where torch and lm-eval are in use already.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, final

import lm_eval
import torch
import transformers
from lm_eval.api.model import CacheHook
from lm_eval.models.huggingface import HFLM
from transformers import StoppingCriteria, StoppingCriteriaList

_LOOK_BACK = 2  # tokens beyond a stop's own that may hold it in another tokenisation; as lm-eval looks


@final
class ResidentLM(HFLM):  # type: ignore[misc]
    """HFLM whose generations stop row by row and say whether they were cut off.

    Args:
        reference: Whether everything that HFLM computes is computed by HFLM.
        options: What HFLM takes.
    """

    def __init__(self, *, reference: bool = False, **options: Any) -> None:
        super().__init__(**options)
        self._reference = reference
        self._rows: list[bool] = []

    def settings(self) -> str:
        """What answers depend on beside weights and requests, as one line."""
        config = self.model.config
        facts = {
            "reference": self._reference,
            "device": self.device.type,
            "dtype": str(self.model.dtype),
            "batch_size": self.batch_size,
            "max_length": self.max_length,
            "attention": config._attn_implementation,
            "tokens": [self.tokenizer.pad_token_id, self.eot_token_id, self.prefix_token_id],
            "vocabulary": len(self.tokenizer),
            "versions": [torch.__version__, transformers.__version__, lm_eval.__version__],
        }
        return json.dumps(facts, sort_keys=True)

    def generate(self, instances: Sequence[Any]) -> tuple[list[str], list[bool]]:
        """`generate_until`, and for each answer whether it ran into `max_gen_toks` without a stop."""
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


def _name(request: Iterable[Any]) -> str:
    context, options = request
    return repr((context, sorted(options.items(), key=str)))
