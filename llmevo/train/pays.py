"""How many candidates to train at once: a measurement, where it can be worth one."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch

from llmevo.genome.train import TrainSpec
from llmevo.train.adapters import Targets, adapted
from llmevo.train.data import Example
from llmevo.train.forward import Forward
from llmevo.train.loop import Training
from llmevo.train.methods import config
from llmevo.train.stack import read
from llmevo.train.together import Candidate, Together, stackable

_SIZES = (2, 4, 8)
_GAIN = 1.1  # less is not worth a stack
# Above so many tokens a step, products of matrices are what a CPU is busy with, and they gain nothing.
_MOST_ON_CPU = 256


def how_many(
    spec: TrainSpec, model: Any, forward: Forward, targets: Targets, examples: Sequence[Example], seed: int
) -> tuple[int, str]:
    """How many candidates to train at once, and why.

    Args:
        spec: The section `train`; its `together` decides, unless it is `auto`.
        model: The resident model.
        forward: Its forward pass.
        targets: Of the model.
        examples: To learn from.
        seed: Of the first weights.
    """
    if spec.together != "auto":
        return (1 if spec.together == "off" else spec.together), "as `train.together` says"
    settings = spec.settings({})
    if not stackable(settings):
        return 1, f"{settings.adapter} is trained alone"
    count = settings.batch_size
    steps = [
        [
            (at % len(examples), len(examples[at % len(examples)]))
            for at in range(step * count, (step + 1) * count)
        ]
        for step in range(2)
    ]
    tokens = sum(end for step in steps for _, end in step) // 2
    if model.device.type == "cpu" and tokens > _MOST_ON_CPU:
        return 1, f"{tokens} tokens a step are too many to gain on a CPU"
    configured = config(settings, targets, seed, len(steps))
    with adapted(model, settings, configured, "cand0000", seed) as adapter:
        training = Training(forward, adapter, examples, settings, seed, steps)
        state = read(model, "cand0000", training.optimizer, [])

    def seconds(size: int) -> float:
        stack = Together(model, forward, examples, [Candidate(settings, steps, state)] * size)
        stack.run([1] * size)  # the first step finds its memory and its kernels
        _wait(model)
        started = time.perf_counter()
        stack.run()
        _wait(model)
        return time.perf_counter() - started

    # What one alone makes first, such as the states below the adapters, would make the stacks look better.
    seconds(1)
    alone = seconds(1)
    best, gain = 1, _GAIN
    for size in _SIZES:
        try:
            found = size * alone / seconds(size)
        except torch.OutOfMemoryError:
            break
        if found < gain:
            break
        best, gain = size, found
    why = f"{best} at once are {gain:.1f} times as fast" if best > 1 else "several at once are no faster"
    return best, f"{why} with {tokens} tokens a step"


def _wait(model: Any) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
