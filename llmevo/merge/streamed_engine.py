"""The merge's arithmetic on a device that does not hold the models: they come a block at a time.

While one block is merged, the next is copied into the other of two staging areas; on a GPU by a stream of its
own, from pinned memory where there is some. On any other device the same steps run one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, final

from llmevo.merge.layout import Arena, Slot, padded
from llmevo.merge.torch_engine import TorchEngine
from llmevo.merge.works import Mask, Work, moved, pieces, reads

if TYPE_CHECKING:
    import torch

# Elements of a block, for each model that is read.
BLOCK = 1 << 22
AREAS = 2


@final
class StreamedEngine:
    """`TorchEngine` on staged copies of what lies elsewhere.

    Args:
        arena: The buffers; it gets the staging areas too.
        device: Where the outputs lie and merges are computed.
        block: Elements at a time.
        far: Which buffers have to be copied; None for those that are on another device.
    """

    name = "torch"

    def __init__(
        self,
        arena: Arena,
        device: torch.device,
        block: int = BLOCK,
        far: Callable[[torch.Tensor], bool] | None = None,
    ) -> None:
        self._arena = arena
        self._device = device
        self._block = block
        self._far = far or (lambda buffer: buffer.device.type != device.type)
        self._inner = TorchEngine(arena, block)
        self._lanes = _Lanes(device)
        self._areas: dict[tuple[int, torch.dtype], int] = {}

    def run(self, works: Sequence[Work]) -> list[int]:
        """As `Engine.run`."""
        import torch

        parts = [(index, part) for index, work in enumerate(works) for part in pieces(work, self._block)]
        flags: list[torch.Tensor] = []
        following = self._staged(parts[0][1], 0) if parts else None
        for number in range(len(parts)):
            area, part = number % AREAS, following
            assert part is not None
            if number + 1 < len(parts):
                following = self._staged(parts[number + 1][1], 1 - area)
            with self._lanes.merging(area):
                flags.append(self._inner.merge(part))
        finite = torch.stack(flags).tolist() if flags else []
        return sorted({index for (index, _), fine in zip(parts, finite, strict=True) if not fine})

    def histogram(self, base: Slot, source: Slot, within: int | None = None) -> Any:
        """As `Engine.histogram`."""
        with self._near(base, source) as near:
            return self._inner.histogram(near[base], near[source], within)

    def mass_by_noise(self, base: Slot, source: Slot, key: tuple[int, int], buckets: int) -> Any:
        """As `Engine.mass_by_noise`."""
        with self._near(base, source) as near:
            return self._inner.mass_by_noise(near[base], near[source], key, buckets)

    def kept_mass(self, base: Slot, source: Slot, mask: Mask) -> float:
        """As `Engine.kept_mass`."""
        with self._near(base, source, *(() if mask.ranks is None else (mask.ranks,))) as near:
            return self._inner.kept_mass(near[base], near[source], mask.moved(near))

    def _staged(self, work: Work, area: int) -> Work:
        """Begin to copy what some work reads, and return the work on the copies."""
        with self._lanes.copying(area):
            return moved(work, self._copied(reads(work), area))

    @contextmanager
    def _near(self, *slots: Slot) -> Iterator[dict[Slot, Slot]]:
        """Copy whole tensors, which are measured once and not in pieces."""
        with self._lanes.copying(0):
            table = self._copied(slots, 0)
        with self._lanes.merging(0):
            yield table

    def _copied(self, slots: Sequence[Slot], area: int) -> dict[Slot, Slot]:
        table = {slot: slot for slot in slots}
        ends: dict[torch.dtype, int] = {}
        far = [slot for slot in table if self._far(self._arena.buffers[slot.buffer])]
        for slot in far:
            dtype = self._arena.buffers[slot.buffer].dtype
            start = ends.get(dtype, 0)
            table[slot] = Slot(self._area(area, dtype), start, start + slot.stop - slot.start)
            ends[dtype] = padded(table[slot].stop)
        for dtype, end in ends.items():
            self._grow(self._area(area, dtype), end)
        for slot in far:
            self._view(table[slot]).copy_(self._view(slot), non_blocking=True)
        return table

    def _area(self, area: int, dtype: torch.dtype) -> int:
        """Return the index of a staging area's buffer in the arena."""
        import torch

        if (area, dtype) not in self._areas:
            self._areas[area, dtype] = len(self._arena.buffers)
            self._arena.buffers.append(torch.empty(0, dtype=dtype, device=self._device))
        return self._areas[area, dtype]

    def _grow(self, buffer: int, size: int) -> None:
        if self._arena.buffers[buffer].numel() < size:
            self._arena.buffers[buffer] = self._arena.buffers[buffer].new_empty(size)

    def _view(self, slot: Slot) -> torch.Tensor:
        return self._arena.buffers[slot.buffer][slot.start : slot.stop]


@final
class _Lanes:
    """Keeps copies and merges in order where they run at the same time.

    Args:
        device: A GPU gets a second stream; elsewhere everything is in order already.
    """

    def __init__(self, device: torch.device) -> None:
        self._side: Any = None
        if device.type == "cuda":
            import torch

            self._device = device
            cuda: Any = torch.cuda  # whose classes are not typed
            self._side = cuda.Stream(device)
            self._copied = [cuda.Event() for _ in range(AREAS)]
            self._merged = [cuda.Event() for _ in range(AREAS)]

    @contextmanager
    def copying(self, area: int) -> Iterator[None]:
        """Copy into an area, when what was in it has been merged."""
        if self._side is None:
            yield
            return
        import torch

        # A staging buffer that is replaced may still be read by a merge, and a new one is made on this
        # stream: both are only used in the order of these events.
        self._side.wait_event(self._merged[area])
        with torch.cuda.stream(self._side):
            yield
        self._copied[area].record(self._side)

    @contextmanager
    def merging(self, area: int) -> Iterator[None]:
        """Read an area, when it has been copied."""
        if self._side is None:
            yield
            return
        import torch

        main = torch.cuda.current_stream(self._device)
        main.wait_event(self._copied[area])
        yield
        self._merged[area].record(main)
