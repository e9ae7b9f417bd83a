"""Flat buffers: a model's tensors as views of one piece of memory, so that a pass over it is one loop."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

if TYPE_CHECKING:
    import torch

# Elements, not bytes: buffers of different dtypes then have the same offsets, and neighbours in one are
# neighbours in all. 64 elements are at least a cache line of any dtype.
ALIGNMENT = 64


@final
@dataclass(frozen=True, slots=True)
class Slot:
    """Where a tensor lies.

    Args:
        buffer: Index of the buffer in its `Arena`.
        start: First element.
        stop: One past the last element.
    """

    buffer: int
    start: int
    stop: int

    def precedes(self, other: Slot) -> bool:
        """Whether `other` comes next in the same buffer, with nothing but padding between."""
        return self.buffer == other.buffer and padded(self.stop) == other.start


@final
class Arena:
    """The buffers of one merge: what `allocate` made, and tensors that lie elsewhere.

    Attributes:
        buffers: One-dimensional tensors; a `Slot` is a range of one of them.
    """

    def __init__(self) -> None:
        self.buffers: list[torch.Tensor] = []
        self._known: dict[int, int] = {}

    def slot(self, tensor: torch.Tensor) -> Slot:
        """Return where a contiguous tensor lies; one outside of every buffer becomes a buffer of its own."""
        index = self._known.get(tensor.untyped_storage().data_ptr())
        if index is not None and self.buffers[index].dtype == tensor.dtype:
            start = (tensor.data_ptr() - self.buffers[index].data_ptr()) // tensor.element_size()
            if 0 <= start <= start + tensor.numel() <= self.buffers[index].numel():
                return Slot(index, start, start + tensor.numel())
        self.buffers.append(tensor.detach().reshape(-1))
        return Slot(len(self.buffers) - 1, 0, tensor.numel())

    def allocate(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        dtype: torch.dtype,
        device: torch.device,
        *,
        pinned: bool = False,
    ) -> dict[str, torch.Tensor]:
        """Make one zeroed buffer and return its views by name, in the order of `shapes`.

        Pinned memory, which must be main memory, is copied to a GPU while the GPU goes on.
        """
        offsets, total = {}, 0
        for name, shape in shapes.items():
            offsets[name] = total
            total += padded(_size(shape))
        buffer = _zeros(total, dtype, device, pinned)
        self._known[buffer.untyped_storage().data_ptr()] = len(self.buffers)
        self.buffers.append(buffer)
        return {
            name: buffer[offsets[name] : offsets[name] + _size(shape)].view(shape)
            for name, shape in shapes.items()
        }


def padded(elements: int) -> int:
    """Round up to the alignment."""
    return -(-elements // ALIGNMENT) * ALIGNMENT


def place(model: Any, arena: Arena) -> None:
    """Move a model's parameters into one buffer, of which they are views from then on.

    The parameters stay the same objects; tied ones, which are one object, are held once. Buffers of the model
    (rotary frequencies, say) stay where they are.
    """
    parameters = dict(model.named_parameters())
    for dtype in dict.fromkeys(p.dtype for p in parameters.values()):
        own = {name: p for name, p in parameters.items() if p.dtype == dtype}
        device = next(iter(own.values())).device
        views = arena.allocate({name: tuple(p.shape) for name, p in own.items()}, dtype, device)
        for name, parameter in own.items():
            views[name].copy_(parameter.data)
            parameter.data = views[name]


def count_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Return the bytes of some tensors, each once, however many models share it."""
    return sum({t.data_ptr(): t.numel() * t.element_size() for t in tensors}.values())


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for length in shape:
        size *= length
    return size


def _zeros(total: int, dtype: torch.dtype, device: torch.device, pinned: bool) -> torch.Tensor:
    import torch

    if device.type != "cpu" or pinned:
        return torch.zeros(total, dtype=dtype, device=device, pin_memory=pinned)
    import numpy as np

    # numpy asks the kernel for huge pages, torch does not: streams of many buffers miss the TLB without them.
    width = torch.empty((), dtype=dtype).element_size()
    raw = np.zeros(total * width + 64, dtype=np.uint8)
    skip = -raw.ctypes.data % 64
    return torch.from_numpy(raw[skip : skip + total * width]).view(dtype)
