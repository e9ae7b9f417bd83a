"""What a model answers to a segment's requests: asked once for the same weights, and kept."""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, final

from llmevo.errors import StageError
from llmevo.evaluate.cache import AnswerCache, Recent

if TYPE_CHECKING:
    import torch

    from llmevo.evaluate.lm import ResidentLM
    from llmevo.evaluate.plan import Requests, Segment

_SEED = 1234  # of sampled generations; lm-eval's own default


@final
class Answers:
    """Hangs answers on lm-eval's instances, from the model or from what is kept.

    What is kept are the answers themselves and not scores, since metrics such as F1 or a perplexity are
    computed from the answers to all items.

    Args:
        lm: The language model.
        device: Where it is.
        cache: Keeps answers beyond this process; None for this process alone.
    """

    def __init__(self, lm: ResidentLM, device: torch.device, cache: AnswerCache | None) -> None:
        self._lm = lm
        self._device = device
        self._cache = cache
        self._recent = Recent()
        self._promised: dict[tuple[str, str], list[list[Any]]] = {}
        self._settings = lm.settings()
        self._cut: dict[int, bool] = {}

    def known(self, segment: Segment, weights: str) -> bool:
        """Whether the segment's answers for these weights are kept.

        A caller that gets True may leave the model as it is: until it asks about other weights, the answers
        stay in memory.
        """
        key = self._key(segment)
        if any(promised != weights for promised, _ in self._promised):
            self._promised.clear()
        if (weights, key) in self._promised:
            return True
        kept = self._recent.get(weights, key)
        if kept is None and self._cache is not None:
            kept = self._cache.get(weights, key)
            if _fits(kept, segment.requests):
                self._recent.put(weights, key, kept)
        if kept is None or not _fits(kept, segment.requests):
            return False
        self._promised[weights, key] = kept
        return True

    def give(self, segment: Segment, weights: str | None) -> bool:
        """Hang the segment's answers on its instances.

        Args:
            segment: The requests.
            weights: Identity of the model's weights, under which answers are kept; None to keep nothing.

        Returns:
            Whether the model was asked.

        Raises:
            StageError: The model's logits are not finite.
        """
        key = self._key(segment)
        kept = None
        if weights is not None and self.known(segment, weights):
            kept = self._promised[weights, key]
        answers = self._ask(segment.requests) if kept is None else kept
        for sweep, replies in zip(segment.requests, answers, strict=True):
            for instance in sweep.instances:
                # lm-eval appends: a second evaluation would be scored on the first one's answers.
                instance.resps, instance.filtered_resps = [], {}
                self._cut[id(instance)] = False
            for instance, reply in zip(sweep.instances, replies, strict=True):
                if sweep.kind == "generate_until":
                    instance.resps.append(reply[0])
                    self._cut[id(instance)] |= reply[1]
                else:
                    instance.resps.append(tuple(reply) if isinstance(reply, list) else reply)
        if kept is None and weights is not None:
            self._recent.put(weights, key, answers)
            if self._cache is not None:
                self._cache.put(weights, key, answers)
        return kept is None

    def cut(self, instances: Sequence[Any]) -> float:
        """1.0 if any of these instances' last answers was cut off at its longest, else 0.0."""
        return float(any(self._cut[id(instance)] for instance in instances))

    def _key(self, segment: Segment) -> str:
        """What an answer depends on beside the weights."""
        return hashlib.sha256(f"{self._settings} {segment.fingerprint}".encode()).hexdigest()

    def _ask(self, sweeps: Sequence[Requests]) -> list[list[Any]]:
        return [
            self._generate(sweep) if sweep.kind == "generate_until" else self._likelihoods(sweep)
            for sweep in sweeps
        ]

    def _likelihoods(self, sweep: Requests) -> list[Any]:
        answers: list[tuple[float, bool]]
        if sweep.packing is not None:
            answers = self._lm.answer(sweep.packing)
        elif sweep.kind == "loglikelihood":
            answers = self._lm._loglikelihood_tokens(sweep.tokens, disable_tqdm=True)
        else:
            # HFLM sends windows through one batch at a time; sorting them all first would pad differently.
            size = self._lm.batch_size
            answers = []
            for start in range(0, len(sweep.tokens), size):
                part = sweep.tokens[start : start + size]
                answers += self._lm._loglikelihood_tokens(part, disable_tqdm=True)
        if not all(math.isfinite(likelihood) for likelihood, _ in answers):
            raise StageError("evaluate", "the model's logits are not finite.")
        if sweep.kind == "loglikelihood":
            return [list(answer) for answer in answers]
        totals = [0.0] * len(sweep.instances)
        for owner, (likelihood, _) in zip(sweep.owners, answers, strict=True):
            totals[owner] += likelihood
        return totals

    def _generate(self, sweep: Requests) -> list[list[Any]]:
        import torch

        devices = [self._device] if self._device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), _finite_logits(self._lm.model):
            torch.manual_seed(_SEED)
            texts, cut = self._lm.generate(sweep.instances)
        return [[text, was_cut] for text, was_cut in zip(texts, cut, strict=True)]


def _fits(kept: Any, sweeps: Sequence[Requests]) -> bool:
    """Whether what a file gave back has one answer for each request."""
    return (
        isinstance(kept, list)
        and len(kept) == len(sweeps)
        and all(len(replies) == len(sweep.instances) for replies, sweep in zip(kept, sweeps, strict=True))
    )


@contextlib.contextmanager
def _finite_logits(model: Any) -> Iterator[None]:
    """Raise StageError at the first forward pass whose last logits are NaN or infinite.

    Greedy decoding picks some token from NaN logits without complaint, and the garbage would be scored.
    """

    def check(_module: Any, _inputs: Any, output: Any) -> None:
        # A model may mask tokens with -inf; only NaN and +inf say that the weights are broken.
        last = output.logits[:, -1]
        if bool(last.isnan().any()) or bool(last.isposinf().any()):
            raise StageError("evaluate", "the model's logits are not finite.")

    hook = model.register_forward_hook(check)
    try:
        yield
    finally:
        hook.remove()
