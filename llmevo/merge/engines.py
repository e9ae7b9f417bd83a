"""Who runs the merge's inner loops: numba on the CPU, torch elsewhere, with the same arithmetic."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, final

import numpy as np

from llmevo.merge.layout import Arena, Slot

if TYPE_CHECKING:
    import torch

# Elements of one call: enough to hide what a call costs, few enough that threads finish together.
_CHUNK = 1 << 21
# Below this many elements in all, starting threads costs more than they bring.
_SMALL = 1 << 19


@final
@dataclass(frozen=True, slots=True)
class Sum:
    """`out = sum(weights * sources)`, or `base + sum(weights * (sources - base))` with a base.

    Args:
        out: Where the result goes.
        sources: As long as `out`, each.
        weights: One float for each source.
        base: None for a sum of the sources themselves.
    """

    out: Slot
    sources: tuple[Slot, ...]
    weights: tuple[float, ...]
    base: Slot | None = None

    @property
    def size(self) -> int:
        """Elements to write."""
        return self.out.stop - self.out.start

    def part(self, low: int, high: int) -> Sum:
        """The same work on a range of elements."""
        return Sum(
            _cut(self.out, low, high),
            tuple(_cut(source, low, high) for source in self.sources),
            self.weights,
            None if self.base is None else _cut(self.base, low, high),
        )


Work = Sum


class Engine(Protocol):
    """Runs pieces of work on an arena's buffers.

    Attributes:
        name: For records, and part of a merge's identity: engines may differ in one rounding.
    """

    name: str

    def run(self, works: Sequence[Work]) -> list[int]:
        """Do the work; return the indices of those whose result has a value that is not finite."""
        ...


@final
class NumbaEngine:
    """Compiled loops over bfloat16 and float32 buffers in main memory.

    Args:
        arena: The buffers.
        threads: How many share the work; None for as many as torch uses.
    """

    name = "numba"

    def __init__(self, arena: Arena, threads: int | None = None) -> None:
        import torch

        self._arena = arena
        self._arrays: list[Any] = []
        self._threads = threads or torch.get_num_threads()
        self._pool: ThreadPoolExecutor | None = None

    def run(self, works: Sequence[Work]) -> list[int]:
        """As `Engine.run`."""
        from llmevo.merge import kernels

        for buffer in self._arena.buffers[len(self._arrays) :]:
            self._arrays.append(_array(buffer))
        chunks = [
            (index, work.part(low, min(low + _CHUNK, work.size)))
            for index, work in enumerate(works)
            for low in range(0, work.size, _CHUNK)
        ]
        bad: set[int] = set()

        def one(index: int, work: Work) -> None:
            if self._sum(work) >= kernels.NOT_FINITE:
                bad.add(index)

        self._share(chunks, one)
        return sorted(bad)

    def _share(self, chunks: list[tuple[int, Work]], one: Callable[[int, Work], None]) -> None:
        if self._threads < 2 or sum(work.size for _, work in chunks) < _SMALL:
            for index, work in chunks:
                one(index, work)
            return
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="merge")
        queue, lock = iter(chunks), threading.Lock()

        def drain() -> None:
            while True:
                with lock:
                    chunk = next(queue, None)
                if chunk is None:
                    return
                one(*chunk)

        for future in [self._pool.submit(drain) for _ in range(self._threads)]:
            future.result()

    def _sum(self, work: Sum) -> int:
        from llmevo.merge import kernels

        out, sources = self._view(work.out), tuple(self._view(slot) for slot in work.sources)
        weights = [np.float32(weight) for weight in work.weights]
        if work.base is None:
            fused = {1: kernels.sum1, 2: kernels.sum2, 3: kernels.sum3}.get(len(sources))
            if fused is not None:
                return int(fused(out, *sources, *weights))
            return int(kernels.sum_many(out, sources, np.array(weights, dtype=np.float32)))
        base = self._view(work.base)
        fused = {1: kernels.shift1, 2: kernels.shift2, 3: kernels.shift3}.get(len(sources))
        if fused is not None:
            return int(fused(out, base, *sources, *weights))
        return int(kernels.shift_many(out, base, sources, np.array(weights, dtype=np.float32)))

    def _view(self, slot: Slot) -> Any:
        return self._arrays[slot.buffer][slot.start : slot.stop]


@final
class TorchEngine:
    """The same arithmetic in torch's operations, on any device and for any dtype.

    Args:
        arena: The buffers.
        block: Elements at a time, which bounds the temporaries: a few float32 of this size.
    """

    name = "torch"

    def __init__(self, arena: Arena, block: int = 1 << 22) -> None:
        self._arena = arena
        self._block = block

    def run(self, works: Sequence[Work]) -> list[int]:
        """As `Engine.run`."""
        import torch

        flags = [self._one(work) for work in works]
        if not flags:
            return []
        return [i for i, finite in enumerate(torch.stack(flags).tolist()) if not finite]

    def _one(self, work: Work) -> torch.Tensor:
        import torch

        finite: torch.Tensor | None = None
        for low in range(0, work.size, self._block):
            part = work.part(low, min(low + self._block, work.size))
            out = self._view(part.out)
            value = self._sum(part)
            out.copy_(value.to(self._view(part.sources[0]).dtype) if out.dtype.itemsize > 2 else value)
            here = torch.isfinite(out).all()
            finite = here if finite is None else finite & here
        assert finite is not None
        return finite

    def _sum(self, work: Sum) -> torch.Tensor:
        sources = [self._view(slot) for slot in work.sources]
        if work.base is None:
            total = sources[0].float() * work.weights[0]
            for source, weight in zip(sources[1:], work.weights[1:], strict=True):
                total.add_(source.float(), alpha=weight)
            return total
        base = self._view(work.base).float()
        total = base.clone()
        step = None
        for source, weight in zip(sources, work.weights, strict=True):
            delta = (source.float() - base).to(source.dtype).float().mul_(weight)
            step = delta if step is None else step.add_(delta)
        return total if step is None else total.add_(step)

    def _view(self, slot: Slot) -> torch.Tensor:
        return self._arena.buffers[slot.buffer][slot.start : slot.stop]


def engine_for(arena: Arena, device: torch.device, dtypes: Sequence[torch.dtype]) -> Engine:
    """Return numba's engine for what it knows: main memory, bfloat16 and float32; torch's for the rest."""
    import importlib.util

    import torch

    known = {torch.bfloat16, torch.float32}
    if device.type == "cpu" and set(dtypes) <= known and importlib.util.find_spec("numba") is not None:
        return NumbaEngine(arena)
    return TorchEngine(arena)


def _cut(slot: Slot, low: int, high: int) -> Slot:
    return Slot(slot.buffer, slot.start + low, slot.start + high)


def _array(buffer: torch.Tensor) -> Any:
    """View a buffer as numpy; bfloat16 as uint16, other dtypes than it and float32 are not looked at."""
    import torch

    if buffer.dtype == torch.bfloat16:
        return buffer.view(torch.uint16).numpy()
    return buffer.numpy() if buffer.dtype == torch.float32 else None
