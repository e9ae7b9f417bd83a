"""Candidates of one batch trained together, ahead of the trials that ask for them.

Each is left in the file in which a training alone keeps its state, at the step where its trial wants it: the
trial loads it, has nothing more to train, and goes on as ever. So whatever a stack does not do well (a
candidate that fails, memory that runs out) is done again by the training alone, which says what is wrong.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from llmevo.errors import GenomeError
from llmevo.genome.train import TrainSettings
from llmevo.train import adapters
from llmevo.train.data import Example
from llmevo.train.forward import Forward
from llmevo.train.loop import Step, Training
from llmevo.train.methods import config
from llmevo.train.stack import State, read, write
from llmevo.train.together import Candidate, Together, stackable

_SAVE_EVERY = 60.0  # seconds


@final
@dataclass(frozen=True, slots=True)
class Ahead:
    """A candidate to train.

    Args:
        settings: The hyperparameters.
        name: The adapter's.
        steps: From `loop.plan`.
        end: After how many of them to stop.
        state: The file that has its state, or will have it.
    """

    settings: TrainSettings
    name: str
    steps: list[Step]
    end: int
    state: Path


def train_ahead(
    model: Any,
    forward: Forward,
    targets: adapters.Targets,
    examples: Sequence[Example],
    seed: int,
    asked: Sequence[Ahead],
) -> int:
    """Train those that can be stacked, and save their states; return how many there were.

    Args:
        model: The resident model.
        forward: Its forward pass.
        targets: Of the model.
        examples: To learn from.
        seed: Of the order and the first weights.
        asked: The candidates.
    """

    @contextmanager
    def alone(one: Ahead) -> Iterator[Training]:
        configured = config(one.settings, targets, seed, len(one.steps))
        with adapters.adapted(model, one.settings, configured, one.name, seed) as adapter:
            yield Training(forward, adapter, examples, one.settings, seed, one.steps)

    chosen: list[Ahead] = []
    candidates: list[Candidate] = []
    for one in asked:
        if not stackable(one.settings):
            continue
        try:
            with alone(one) as training:
                if one.state.is_file():
                    training.load(one.state, one.end)
                if len(training.losses) < one.end:
                    state = read(model, one.name, training.optimizer, training.losses)
                    candidates.append(Candidate(one.settings, one.steps, state))
                    chosen.append(one)
        except GenomeError:  # it does not fit the model, as the trial will say
            continue
    if len(chosen) < 2:
        return 0

    def save(one: Ahead, state: State) -> None:
        with alone(one) as training:
            write(state, model, one.name, training.optimizer)
            training.losses = list(state.losses)
            training.save(one.state)

    stack = Together(model, forward, examples, candidates)
    over = False
    while not over:
        over = stack.run([one.end for one in chosen], _SAVE_EVERY)
        for index, one in enumerate(chosen):
            if stack.errors[index] is None:
                save(one, stack.state(index))
    return len(chosen)
