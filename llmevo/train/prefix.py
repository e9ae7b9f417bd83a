"""What the frozen layers below the lowest adapter make of each example, computed once for all candidates.

Nothing below the first adapted layer depends on a candidate, so the hidden states that enter that layer are
the same for all candidates on equal weights. They are kept by the tokens of the example; the layers below
pass on what they are given, and the model's own code runs on. Whether the weights are equal is read off the
weights, so that no merge and no 4-bit base is mistaken for another.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, final

import numpy as np
import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from llmevo.train.data import Batch, lay_out
from llmevo.train.example import Example

# Tokens that are computed at once. Which examples belong together is settled at the start, so that a run that
# is continued, which asks for others first, gets the same bits.
_GROUP = 512
_SHARE, _MOST = 8, 4 << 30  # at most that part of the device's memory, and that many bytes


@final
@dataclass(slots=True)
class _Held:
    """The states that enter one layer, by the bytes of the example's tokens.

    Args:
        marks: Of the weights that made them.
        states: Each of shape (length, hidden).
        bytes: Of all states.
    """

    marks: tuple[int, ...]
    states: dict[bytes, torch.Tensor] = field(default_factory=dict)
    bytes: int = 0


@final
class Prefix:
    """The states that enter the first adapted layer of one resident model.

    Args:
        body: The model without its head. Its layers are a list of modules, each of which takes the hidden
            states as its first argument and returns them; where they are not, `first` stays 0.
        run: Computes a batch with it.
        packed: Whether examples share rows.
        known: Examples that will be asked for, in about that order; others are computed whenever they come.
        most: Bytes of states that are held; None for an eighth of the device's memory, at most 4 GiB.

    Attributes:
        first: The layer that is entered; 0 outside of `above`, and where nothing can be spared.
        still: Whether the layers below compute the same in a training as without (there is no dropout).
        tokens: Of how many known tokens the states fit into `most`.
        bytes: What these take.
    """

    def __init__(
        self,
        body: Any,
        run: Callable[[Batch], Any],
        packed: bool,
        known: Iterable[Example],
        most: int | None = None,
    ) -> None:
        self._body, self._run, self._packed = body, run, packed
        self._layers = _layers(body)
        config = body.config.get_text_config()
        self.still = not any(
            "drop" in name and isinstance(value, (int, float)) and value > 0
            for name, value in config.to_dict().items()
        )
        self.first = 0
        self._width = int(config.hidden_size) * next(body.parameters()).element_size()
        self._most = _room(body.device) if most is None else most
        self._groups: list[list[Example]] = []
        self._group_of: dict[bytes, int] = {}
        self.tokens = self._divide(known) if self._layers else 0
        self.bytes = self.tokens * self._width
        self._held: dict[int, _Held] = {}

    def _divide(self, known: Iterable[Example]) -> int:
        """Put known examples into groups while they fit; return their tokens."""
        total = size = 0
        for example in known:
            key = example.tokens.tobytes()
            if key in self._group_of:
                continue
            total += len(example)
            if total * self._width > self._most:
                return total - len(example)
            if not self._groups or size >= _GROUP:
                self._groups.append([])
                size = 0
            self._group_of[key] = len(self._groups) - 1
            self._groups[-1].append(_bare(example.tokens))
            size += len(example)
        return total

    @contextmanager
    def above(self) -> Iterator[None]:
        """Within the block the adapters stay where they are and the weights below them what they are.

        `first` is the lowest layer with an adapter; states of other weights are forgotten.
        """
        first = self._lowest()
        if first:
            marks = self._marks(first)
            self._held = {
                layer: held
                for layer, held in self._held.items()
                if all(one == other for one, other in zip(held.marks, marks, strict=False))
            }
            self._held.setdefault(first, _Held(marks))
        self.first = first
        try:
            yield
        finally:
            self.first = 0

    @contextmanager
    def entered(self, batch: Batch) -> Iterator[None]:
        """Within the block the body computes this batch from the layer `first` on.

        Args:
            batch: What it will be given.
        """
        states = self._states(batch)
        forwards: list[Any] = [lambda hidden, *_, **__: hidden] * (self.first - 1)
        with _replaced(self._layers, [*forwards, lambda *_, **__: states]):
            yield

    def _states(self, batch: Batch) -> torch.Tensor:
        """The states of a batch, shape (rows, width, hidden); 0 where no example is."""
        tokens = batch.tokens.reshape(-1)
        parts = [tokens[at : at + n] for at, n in zip(batch.starts, batch.lengths, strict=True)]
        keys = [part.tobytes() for part in parts]
        known, others = self._held[self.first].states, {}
        for key, part in zip(keys, parts, strict=True):
            if key in known:
                continue
            if key in self._group_of:
                self._learn(self._groups[self._group_of[key]])
            else:
                others[key] = _bare(part)
        found = dict(zip(others, self._compute(list(others.values())), strict=True))
        rows = [known[key] if key in known else found[key] for key in keys]
        states = rows[0].new_zeros(*batch.tokens.shape, rows[0].shape[-1])
        flat = states.view(-1, states.shape[-1])
        for row, at in zip(rows, batch.starts, strict=True):
            flat[at : at + len(row)] = row
        return states

    def _learn(self, group: Sequence[Example]) -> None:
        """Compute and keep a group; what entered other layers makes room for it, if there is none."""
        states = self._compute(group)
        kept = self._held[self.first]
        size = sum(state.nbytes for state in states)
        if size + sum(held.bytes for held in self._held.values()) > self._most:
            self._held = {self.first: kept}
        kept.bytes += size
        kept.states.update(
            (example.tokens.tobytes(), state) for example, state in zip(group, states, strict=True)
        )

    def _compute(self, examples: Sequence[Example]) -> list[torch.Tensor]:
        """The states of examples that share a pass; nothing above them is computed."""
        if not examples:
            return []
        batch = lay_out(examples, self._packed)
        entering: list[torch.Tensor] = []

        def enter(hidden: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
            entering.append(hidden)
            return hidden

        forwards: list[Any] = [lambda hidden, *_, **__: hidden] * (len(self._layers) - self.first - 1)
        # What inference mode makes could not be entered by a training.
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            _replaced(self._layers[self.first :], [enter, *forwards]),
        ):
            self._run(batch)
            flat = entering[0].reshape(-1, entering[0].shape[-1])
            return [flat[at : at + n].clone() for at, n in zip(batch.starts, batch.lengths, strict=True)]

    def _lowest(self) -> int:
        """The lowest layer with an adapter on it; 0 if there is none, or the embeddings have one."""
        if any(_adapted(part) for part in self._outside()):
            return 0
        return next((n for n, layer in enumerate(self._layers) if _adapted(layer)), 0)

    def _outside(self) -> list[torch.nn.Module]:
        """The body's parts that are no layers."""
        inside = set(self._layers)
        return [part for part in self._body.children() if inside.isdisjoint(part.modules())]

    def _marks(self, first: int) -> tuple[int, ...]:
        """A number each for the weights outside of the layers and of each layer below `first`."""
        parts = [torch.nn.ModuleList(self._outside()), *self._layers[:first]]
        sums = [[_bits(parameter) for parameter in part.parameters()] for part in parts]
        flat = iter(torch.stack([one for part in sums for one in part]).tolist())
        return tuple(hash(tuple(next(flat) for _ in part)) for part in sums)


def _layers(body: Any) -> list[torch.nn.Module]:
    """The body's layers; empty where they are not one list of as many as the configuration says."""
    count = getattr(body.config.get_text_config(), "num_hidden_layers", 0)
    lists = [part for part in body.children() if isinstance(part, torch.nn.ModuleList) and len(part) == count]
    return list(lists[0]) if len(lists) == 1 else []


def _adapted(part: torch.nn.Module) -> bool:
    trained = any(parameter.requires_grad for parameter in part.parameters())
    return trained or any(isinstance(module, BaseTunerLayer) for module in part.modules())


def _bits(parameter: torch.nn.Parameter) -> torch.Tensor:
    """The sum of a parameter's bits, eight bytes at a time."""
    flat = parameter.detach().reshape(-1)
    size = flat.element_size()
    whole = flat.numel() * size % 8 == 0 == flat.storage_offset() * size % 8
    return flat.view(torch.int64 if whole else torch.uint8).sum(dtype=torch.int64)


def _bare(tokens: Any) -> Example:
    """An example that is not learnt from."""
    return Example(tokens, np.zeros(len(tokens), dtype=np.bool_))


def _room(device: torch.device) -> int:
    """How many bytes of states may be held on a device."""
    if device.type == "cuda":
        total = int(torch.cuda.get_device_properties(device).total_memory)
    elif hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    else:
        total = _MOST
    return min(total // _SHARE, _MOST)


@contextmanager
def _replaced(modules: Sequence[Any], forwards: Sequence[Callable[..., Any]]) -> Iterator[None]:
    """Let the first modules compute by these functions within the block."""
    chosen = modules[: len(forwards)]
    before = [vars(module).get("forward") for module in chosen]  # as hooks of other packages set it
    try:
        for module, forward in zip(chosen, forwards, strict=True):
            module.forward = forward
        yield
    finally:
        for module, known in zip(chosen, before, strict=True):
            vars(module).pop("forward", None)
            if known is not None:
                module.forward = known
