"""The training loop: plain PyTorch, exact in its tokens, and able to go on where it was left.

The loss of a batch is the mean over its target tokens, however the batch is laid out or divided.
"""

from __future__ import annotations

import json
import math
import os
import time
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeAlias, final

import numpy as np

from llmevo.errors import StageError
from llmevo.genome.train import TrainSettings
from llmevo.train import optimizers
from llmevo.train.adapters import Adapter
from llmevo.train.data import Example
from llmevo.train.forward import Losses

_SMOOTH = 0.9  # of the running mean of the loss
_FIRST = 16  # examples whose mean loss is what divergence is measured against
_DIVERGED = 1.5
_SAVE_EVERY = 60.0  # seconds
_WEIGHT, _METHOD = "weight/", "method/"  # what names in a state begin with; the others are the optimizer's

Step: TypeAlias = list[tuple[int, int]]  # the examples of a step, each with the tokens that are used of it


def plan(examples: Sequence[Example], settings: TrainSettings, seed: int) -> list[Step]:
    """Which examples each optimizer step sees.

    Each epoch is a permutation of its own. The last example is cut where the budget ends, so that all steps
    together have exactly `tokens` tokens, or `epochs` times those of the examples.

    Raises:
        StageError: The budget ends before the first token to learn.
    """
    lengths = [len(example) for example in examples]
    budget = settings.tokens or max(round(settings.epochs * sum(lengths)), 2)
    stream: Step = []
    epoch = 0
    while budget > 0:
        for index in order(len(lengths), seed, epoch):
            if budget <= 0:
                break
            stream.append((index, min(lengths[index], budget)))
            budget -= lengths[index]
        epoch += 1
    size = settings.batch_size
    steps = [stream[start : start + size] for start in range(0, len(stream), size)]
    # The cut may leave the last step nothing to learn: then it is a part of the one before.
    if not any(examples[index].targets[:end].any() for index, end in steps[-1]):
        if len(steps) == 1:
            raise StageError(
                "train", "the budget has no token to learn: raise `train.tokens` or `train.epochs`"
            )
        steps[-2:] = [steps[-2] + steps[-1]]
    return steps


def order(count: int, seed: int, epoch: int = 0) -> list[int]:
    """The order in which an epoch sees examples 0 to `count - 1`."""
    found: list[int] = np.random.default_rng([seed, epoch]).permutation(count).tolist()
    return found


def tokens_of(steps: Sequence[Step]) -> int:
    """How many tokens the steps use."""
    return sum(end for step in steps for _, end in step)


def within(steps: Sequence[Step], share: float) -> int:
    """How many of the planned steps fit into a share of their tokens."""
    totals = list(accumulate(tokens_of([step]) for step in steps))
    return bisect_right(totals, round(share * totals[-1]))


def learning_rate(settings: TrainSettings, step: int, steps: int) -> float:
    """The learning rate of step 0 to `steps - 1`."""
    rising = math.ceil(settings.warmup * steps)
    falling = math.floor(settings.decay * steps) if settings.schedule == "wsd" else 0
    factor = min(1.0, (step + 1) / rising) if rising else 1.0
    if falling and step >= steps - falling:
        factor = min(factor, (steps - step) / falling)
    return settings.learning_rate * factor


def check(losses: Sequence[float], settings: TrainSettings, steps: int) -> None:
    """Stop a training that has gone wrong.

    Args:
        losses: Of the steps that are done.
        settings: The hyperparameters.
        steps: How many there are.

    Raises:
        StageError: The last loss is not finite, or the late ones are far above the first.
    """
    step, remedy = len(losses) - 1, "lower `train.learning_rate`"
    if not math.isfinite(losses[-1]):
        raise StageError("train", f"the loss is not finite in step {step + 1} of {steps}: {remedy}")
    first = losses[: math.ceil(_FIRST / settings.batch_size)]
    if step < max(len(first), math.ceil(settings.warmup * steps)):
        return
    smooth, start = mean_of_late(losses), sum(first) / len(first)
    if smooth > _DIVERGED * start:
        raise StageError(
            "train",
            f"the loss diverged from {start:.3g} to {smooth:.3g} in step {step + 1} of {steps}: {remedy}",
        )


@final
class Training:
    """One candidate's training.

    Args:
        forward: The resident model's forward pass.
        adapter: The adapter that is on it.
        examples: To learn from.
        settings: The hyperparameters.
        seed: Of the order of the examples and of dropout.
        steps: From `plan`.

    Attributes:
        losses: The mean loss over the targets of each step that is done, in nats.
        optimizer: AdamW over the adapter's parameters.
        history: What `tick` notes of the steps that are done; kept with the state.
    """

    def __init__(
        self,
        forward: Losses,
        adapter: Adapter,
        examples: Sequence[Example],
        settings: TrainSettings,
        seed: int,
        steps: list[Step],
    ) -> None:
        self._forward, self._adapter, self._examples = forward, adapter, examples
        self._settings, self._seed, self._steps = settings, seed, steps
        self._parameters = adapter.parameters()
        self.optimizer = optimizers.make(self._parameters, settings)
        self.losses: list[float] = []
        self.history: list[dict[str, float]] = []

    def run(
        self,
        model: Any,
        state: Path | None = None,
        tick: Callable[[int], None] | None = None,
        until: int | None = None,
    ) -> None:
        """Train to the end, or up to a step, from which a training with the same `state` goes on.

        Whatever the stops on the way, the weights at the end are those of a training without any: the
        learning rate follows from the planned number of steps, and the order and dropout from the step.

        Args:
            model: The resident model.
            state: A file of which the training goes on, if it is there and its own, and into which it saves
                itself every minute and where it stops; removed when it is done.
            tick: Called after each step with its number.
            until: How many of the planned steps to have done; None for all.

        Raises:
            StageError: The loss is not finite, or diverges.
        """
        import torch

        from llmevo.train.quick import quick

        settings = self._settings
        end = len(self._steps) if until is None else until
        if state is not None and state.is_file():
            self.load(state, end)
        devices = [model.device] if model.device.type == "cuda" else []
        saved = time.monotonic()
        if settings.checkpointing:
            checkpointing(model, True)
        model.train()
        try:
            with torch.random.fork_rng(devices=devices), quick(model, self._adapter.name):
                for step in range(len(self.losses), end):
                    # Dropout follows from the step, so that a training that goes on needs no random state.
                    torch.manual_seed((self._seed << 32) + step)
                    self._step(step)
                    check(self.losses, settings, len(self._steps))
                    if tick is not None:
                        tick(step)
                    if state is not None and time.monotonic() - saved > _SAVE_EVERY:
                        self.save(state)
                        saved = time.monotonic()
        finally:
            model.eval()
            if settings.checkpointing:
                checkpointing(model, False)
        if state is None:
            return
        if end < len(self._steps):
            self.save(state)
        else:
            state.unlink(missing_ok=True)

    def _step(self, number: int) -> None:
        import torch

        settings = self._settings
        chosen = [self._examples[index].first(end) for index, end in self._steps[number]]
        count = sum(int(example.targets.sum()) for example in chosen)
        size = math.ceil(len(chosen) / settings.accumulation)
        total = 0.0
        for start in range(0, len(chosen), size):
            part = chosen[start : start + size]
            if not any(example.targets.any() for example in part):
                continue
            losses, _ = self._forward.losses(part)
            loss = losses.sum() / count
            total += loss.item()
            if not math.isfinite(total):
                break
            (loss + self._adapter.penalty() * len(part) / len(chosen)).backward()  # type: ignore[no-untyped-call]
        self.losses.append(total)
        if not math.isfinite(total):
            return
        if settings.clip > 0:
            torch.nn.utils.clip_grad_norm_(list(self._parameters.values()), settings.clip)
        optimizers.step(self.optimizer, learning_rate(settings, number, len(self._steps)))
        self._adapter.stepped(number, len(self._steps))
        self.optimizer.zero_grad(set_to_none=True)

    def save(self, path: Path) -> None:
        """Write the state, atomically, as safetensors: weights, optimizer, what the method keeps, losses."""
        from safetensors.torch import save_file

        tensors = {f"{_WEIGHT}{name}": p.detach() for name, p in self._parameters.items()}
        tensors |= {f"{_METHOD}{key}": tensor for key, tensor in self._adapter.memory().items()}
        tensors |= optimizers.state_of(self.optimizer, self._parameters)
        beside = path.with_name(f".{path.name}.{os.getpid()}")
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()},
            beside,
            metadata={
                "training": self._identity(),
                "losses": json.dumps(self.losses),
                "history": json.dumps(self.history),
            },
        )
        os.replace(beside, path)

    def load(self, path: Path, end: int) -> bool:
        """Go on from a state, if it is of this training and not beyond step `end`; return whether it is."""
        import torch
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as opened:
                facts = opened.metadata() or {}
                if facts.get("training") != self._identity() or len(json.loads(facts["losses"])) > end:
                    return False
                tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
        except (SafetensorError, OSError):  # it was damaged with the machine; the training begins anew
            return False
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(tensors.pop(f"{_WEIGHT}{name}"))
        kept = {key: tensors.pop(key) for key in list(tensors) if key.startswith(_METHOD)}
        optimizers.resume(self.optimizer, self._parameters, tensors)
        self._adapter.remember({key.removeprefix(_METHOD): tensor for key, tensor in kept.items()})
        self.losses, self.history = json.loads(facts["losses"]), json.loads(facts["history"])
        return True

    def _identity(self) -> str:
        shapes = {name: list(parameter.shape) for name, parameter in self._parameters.items()}
        return json.dumps([asdict(self._settings), self._seed, self._steps, shapes])


def checkpointing(model: Any, enable: bool) -> None:
    """Switch the recomputation of activations on or off."""
    # Version 5 of transformers warns of the old name, and its first releases lack the new one.
    kind = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    if not enable:
        getattr(model, f"{kind}_checkpointing_disable")()
        return
    getattr(model, f"{kind}_checkpointing_enable")({"use_reentrant": False})
    # It also makes the embeddings ask for gradients, which this kind of recomputation does not need, and for
    # which the backward pass would go through all layers below the first adapter.
    model.disable_input_require_grads()
    for name in ("_require_grads_hook", "_require_grads_hooks"):
        vars(model).pop(name, None)


def mean_of_late(losses: Sequence[float]) -> float:
    """The mean of the losses with weights that fall by a tenth for each step back."""
    weights = _SMOOTH ** np.arange(len(losses))[::-1]
    return float(np.dot(weights, losses) / weights.sum())
