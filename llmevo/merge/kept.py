"""Merged models that stay in memory, so that weights which are wanted again are not merged again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

from llmevo.merge.layout import Arena, like

if TYPE_CHECKING:
    import torch


@final
@dataclass(slots=True, eq=False)
class _Place:
    """Memory for one merged model.

    Args:
        buffers: By index in the arena.
        weights: The resident model's parameters as views of them, in the model's order.
        name: The identity of the weights that lie there; None while that is not known.
        written: What `FastMerge` knows of them.
    """

    buffers: dict[int, torch.Tensor]
    weights: list[torch.Tensor]
    name: str | None = None
    written: Any = None


@final
class Kept:
    """The places of merged models, in one of which the resident model's weights are.

    Turning to another place copies nothing: the model's parameters, which stay the same objects, become views
    of its memory, and it takes its buffers' place in the arena, so that the next merge is written there. Of
    the places that are not in use, the one that was used the longest ago is written over.

    Args:
        model: The resident model, placed (`layout.place`).
        arena: The buffers.

    Attributes:
        most: How many places there may be, at least 1; memory is taken when a merge first wants it.
    """

    def __init__(self, model: Any, arena: Arena) -> None:
        self.most = 1
        self._arena = arena
        self._parameters = list(model.parameters())  # tied ones once
        self._slots = [arena.slot(parameter.data) for parameter in self._parameters]
        buffers = {slot.buffer: arena.buffers[slot.buffer] for slot in self._slots}
        # The latest used is the last, and is the one in use.
        self._places = [_Place(buffers, [parameter.data for parameter in self._parameters])]

    def turn_to(self, name: str) -> bool:
        """Make the model that of this name, if it is kept; return whether it is."""
        for place in self._places:
            if place.name == name:
                self._use(place)
                return True
        return False

    def make_room(self) -> Any:
        """Make the model one that may be written over, and forget what it was.

        Returns:
            What `FastMerge` left of the weights that lie there.
        """
        if self._places[-1].name is not None and self.most > 1:
            self._use(self._new() if len(self._places) < self.most else self._places[0])
        place = self._places[-1]
        written, place.name, place.written = place.written, None, None
        return written

    def put(self, name: str | None, written: Any) -> None:
        """Remember what lies in the model's memory now, and under which name it is to be found."""
        self._places[-1].name, self._places[-1].written = name, written

    def _new(self) -> _Place:
        """Another place; the one used the longest ago where the memory does not suffice after all."""
        try:
            buffers = {index: like(buffer) for index, buffer in self._places[-1].buffers.items()}
        except MemoryError:
            self.most = len(self._places)
            return self._places[0]
        weights = [
            buffers[slot.buffer][slot.start : slot.stop].view(parameter.shape)
            for slot, parameter in zip(self._slots, self._parameters, strict=True)
        ]
        place = _Place(buffers, weights)
        self._places.append(place)
        return place

    def _use(self, place: _Place) -> None:
        self._places.remove(place)
        self._places.append(place)
        for index, buffer in place.buffers.items():
            self._arena.swap(index, buffer)
        for parameter, weights in zip(self._parameters, place.weights, strict=True):
            parameter.data = weights
