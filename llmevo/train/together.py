"""Several candidates trained at once: each as it would be alone, on the rows that are its own."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, final

import numpy as np
import numpy.typing as npt
import torch

from llmevo.errors import StageError
from llmevo.genome.train import TrainSettings
from llmevo.train.data import Batch, Example, lay_out
from llmevo.train.forward import Forward
from llmevo.train.loop import Step, check, checkpointing, learning_rate
from llmevo.train.norms import quick_norms
from llmevo.train.stack import Stack, State

_IDLE = Example(np.zeros(1, dtype=np.int64), np.zeros(1, dtype=bool))
_PLAIN = ("lora", "rslora", "loraplus", "lorafa")


def stackable(settings: TrainSettings) -> bool:
    """Whether these settings train the same in a stack as alone: a plain BA, and nothing random."""
    return settings.adapter in _PLAIN and settings.dropout == 0 and not settings.starts_from_base


@final
@dataclass(frozen=True, slots=True)
class Candidate:
    """One of those that are trained together.

    Args:
        settings: Its hyperparameters; `stackable`.
        steps: From `loop.plan`.
        state: Where it begins; the first step is the one after its losses.
    """

    settings: TrainSettings
    steps: list[Step]
    state: State


@final
class Together:
    """The training of several candidates on the resident model.

    Args:
        model: The resident model.
        forward: Its forward pass.
        examples: To learn from.
        candidates: At least one.

    Attributes:
        losses: Of each candidate, the mean loss over the targets of each of its steps that is done, in nats.
        errors: Of each candidate, why it was stopped; None if it was not.
    """

    def __init__(
        self, model: Any, forward: Forward, examples: Sequence[Example], candidates: Sequence[Candidate]
    ) -> None:
        self._model, self._forward, self._examples = model, forward, examples
        self._candidates = list(candidates)
        self._states = [candidate.state for candidate in candidates]
        self.losses = [list(state.losses) for state in self._states]
        self.errors: list[StageError | None] = [None] * len(self._states)

    def state(self, index: int) -> State:
        """A candidate's state between two calls of `run`."""
        return self._states[index]

    def keep(self, indices: Sequence[int]) -> None:
        """Go on with these candidates only, in this order."""
        for name in ("_candidates", "_states", "losses", "errors"):
            setattr(self, name, [getattr(self, name)[index] for index in indices])

    def run(self, until: Sequence[int] | None = None, seconds: float = math.inf) -> bool:
        """Train; return whether all are where they should be.

        A candidate that is at its end or stopped leaves the stack, and the others go on.

        Args:
            until: For each candidate, the number of steps after which it pauses; None for all of its plan.
            seconds: After which the training pauses, too, so that the states can be saved.
        """
        ends = [len(c.steps) for c in self._candidates] if until is None else list(until)
        remade = any(candidate.settings.checkpointing for candidate in self._candidates)
        with ExitStack() as after:
            if remade:
                checkpointing(self._model, True)
                after.callback(checkpointing, self._model, False)
            after.callback(self._model.eval)
            end = time.monotonic() + seconds
            while (active := self._unfinished(ends)) and time.monotonic() < end:
                self._run(active, ends, end)
        return not active

    def _unfinished(self, ends: Sequence[int]) -> list[int]:
        return [
            index
            for index, end in enumerate(ends)
            if self.errors[index] is None and len(self.losses[index]) < end
        ]

    def _run(self, active: list[int], ends: Sequence[int], end: float) -> None:
        """Train these until one of them leaves, or the clock says so."""
        chosen = [self._candidates[index].settings for index in active]
        stack = Stack(
            [self._states[index] for index in active],
            [_ratios(settings) for settings in chosen],
            [settings.weight_decay for settings in chosen],
        )
        with stack.on(self._model), quick_norms(self._model), self._forward.above():
            self._model.train()
            while self._unfinished(ends) == active and time.monotonic() < end:
                self._step(stack, active)
        for row, index in enumerate(active):
            self._states[index] = stack.state(row, self.losses[index])

    def _step(self, stack: Stack, active: Sequence[int]) -> None:
        """The next step of each, over as many parts as the one with the most asks for."""
        batches, counts = [], []
        for index in active:
            candidate = self._candidates[index]
            step = candidate.steps[len(self.losses[index])]
            batches.append([self._examples[at].first(end) for at, end in step])
            counts.append(sum(int(example.targets.sum()) for example in batches[-1]))
        parts = max(self._candidates[index].settings.accumulation for index in active)
        totals = np.zeros(len(active))
        stack.zero_gradients()
        for part in range(parts):
            taken = [batch[part::parts] for batch in batches]
            if not any(example.targets.any() for examples in taken for example in examples):
                continue
            means = self._sums(stack, taken) / torch.tensor(counts, device=self._model.device)
            totals += means.detach().double().cpu().numpy()
            good = torch.from_numpy(np.isfinite(totals)).to(means.device)
            # A sum: what is left out of it, for not being finite, has no gradients and gives the others none.
            means[good].sum().backward()  # type: ignore[no-untyped-call]
        for row, index in enumerate(active):
            self._close(stack, row, index, float(totals[row]))

    def _sums(self, stack: Stack, taken: Sequence[Sequence[Example]]) -> torch.Tensor:
        """The sum of each candidate's losses, shape (candidates,)."""
        # A candidate without examples has a row all the same.
        taken = [examples or [_IDLE] for examples in taken]
        if self._forward.in_one_row([example for examples in taken for example in examples]):
            laid = [lay_out(examples, True, sum(map(len, examples))) for examples in taken]
            batch = one_behind_another(laid)
            stack.rows.counts = tuple(part.tokens.size for part in laid)
        else:
            width = max(len(example) for examples in taken for example in examples)
            laid = [lay_out(examples, self._forward.packed, width) for examples in taken]
            batch = side_by_side(laid, width)
            stack.rows.counts = tuple(len(part.tokens) * width for part in laid)
        losses = self._forward.nll(batch)
        return torch.stack(
            [part.sum() for part in torch.split(losses, [len(batch.labels) for batch in laid])]
        )

    def _close(self, stack: Stack, row: int, index: int, loss: float) -> None:
        """One candidate's optimizer step, or its end."""
        candidate, losses = self._candidates[index], self.losses[index]
        losses.append(loss)
        if math.isfinite(loss):
            rate = learning_rate(candidate.settings, len(losses) - 1, len(candidate.steps))
            stack.step(row, rate, candidate.settings.clip)
        try:
            check(losses, candidate.settings, len(candidate.steps))
        except StageError as error:
            self.errors[index] = error


def _ratios(settings: TrainSettings) -> tuple[float, float]:
    """By what the learning rates of A and of B are multiplied."""
    if settings.adapter == "lorafa":
        return 0.0, 1.0
    return 1.0, settings.loraplus_ratio if settings.adapter == "loraplus" else 1.0


def one_behind_another(batches: Sequence[Batch]) -> Batch:
    """One batch of a single row, in which those of several follow each other; owners count through."""
    before = np.cumsum([0, *(batch.tokens.size for batch in batches[:-1])])
    examples = np.cumsum([0, *(len(batch.lengths) for batch in batches[:-1])])

    def joined(name: str, by: npt.NDArray[np.int64] | None = None) -> npt.NDArray[np.int64]:
        moves = np.zeros(len(batches), dtype=np.int64) if by is None else by
        return np.concatenate(
            [getattr(batch, name).reshape(-1) + move for batch, move in zip(batches, moves, strict=True)]
        )

    return Batch(
        joined("tokens")[None],
        joined("positions")[None],
        joined("sources", before),
        joined("labels"),
        joined("owners", examples),
        joined("starts", before),
        joined("lengths"),
    )


def side_by_side(batches: Sequence[Batch], width: int) -> Batch:
    """One batch of the rows of several, filled up to `width`; owners count through."""
    row = one_behind_another([_widened(batch, width) for batch in batches])
    return replace(row, tokens=row.tokens.reshape(-1, width), positions=row.positions.reshape(-1, width))


def _widened(batch: Batch, width: int) -> Batch:
    """A batch whose rows are filled up to `width`."""
    count, own = batch.tokens.shape
    fill = np.tile(np.arange(width - own), (count, 1))

    def moved(places: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        row, column = np.divmod(places, own)
        return row * width + column

    return replace(
        batch,
        tokens=np.pad(batch.tokens, ((0, 0), (0, width - own))),
        positions=np.concatenate([batch.positions, fill], axis=1),
        sources=moved(batch.sources),
        starts=moved(batch.starts),
    )
