"""The merge's arithmetic in compiled loops, over buffers in main memory."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, final

import numpy as np

from llmevo.merge.layout import Arena, Slot
from llmevo.merge.works import Mask, Masked, Product, Sum, Work, pieces

if TYPE_CHECKING:
    import torch

# Elements of one call: enough to hide what a call costs, few enough that threads finish together.
_CHUNK = 1 << 21
# Below this many elements in all, starting threads costs more than they bring.
_SMALL = 1 << 19
_KINDS = {"window": 0, "random": 1, "ranked": 2}


@final
class NumbaEngine:
    """Compiled loops, shared by a few threads.

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
        from llmevo.merge.cells import NOT_FINITE

        self._look()
        chunks = [(index, part) for index, work in enumerate(works) for part in pieces(work, _CHUNK)]
        bad: set[int] = set()

        def one(index: int, work: Work) -> None:
            if self._one(work) >= NOT_FINITE:
                bad.add(index)

        self._share(chunks, one)
        return sorted(bad)

    def histogram(self, base: Slot, source: Slot, within: int | None = None) -> Any:
        """As `Engine.histogram`."""
        from llmevo.merge import mask_kernels

        self._look()
        origin, other = self._view(base), self._view(source)

        def one(low: int) -> Any:
            part = slice(low, low + _CHUNK)
            counts = np.zeros(1 << (15 if within is None else 16), dtype=np.int64)
            if within is None:
                mask_kernels.histogram(origin[part], other[part], counts)
            else:
                mask_kernels.histogram_within(origin[part], other[part], np.uint32(within), counts)
            return counts

        lows = range(0, len(other), _CHUNK)
        return sum(self._threaded().map(one, lows) if len(other) > _CHUNK else map(one, lows))

    def mass_by_noise(self, base: Slot, source: Slot, key: tuple[int, int], buckets: int) -> Any:
        """As `Engine.mass_by_noise`."""
        from llmevo.merge import mask_kernels

        self._look()
        table = np.zeros(buckets)
        mask_kernels.mass_by_noise(self._view(base), self._view(source), *map(np.uint32, key), table)
        return table

    def kept_mass(self, base: Slot, source: Slot, mask: Mask) -> float:
        """As `Engine.kept_mass`."""
        from llmevo.merge import mask_kernels

        self._look()
        ranks = self._view(mask.ranks) if mask.ranks is not None else _no_ranks()
        bounds = (np.uint32(mask.low), np.uint32(mask.high), *map(np.uint32, mask.key))
        arrays = (self._view(base), self._view(source), ranks)
        return float(mask_kernels.kept_mass(*arrays, _KINDS[mask.kind], *bounds))

    def _share(self, chunks: list[tuple[int, Work]], one: Callable[[int, Work], None]) -> None:
        if self._threads < 2 or sum(work.size for _, work in chunks) < _SMALL:
            for index, work in chunks:
                one(index, work)
            return
        pool = self._threaded()
        queue, lock = iter(chunks), threading.Lock()

        def drain() -> None:
            while True:
                with lock:
                    chunk = next(queue, None)
                if chunk is None:
                    return
                one(*chunk)

        for future in [pool.submit(drain) for _ in range(self._threads)]:
            future.result()

    def _threaded(self) -> ThreadPoolExecutor:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="merge")
        return self._pool

    def _one(self, work: Work) -> int:
        if isinstance(work, Masked):
            return self._masked(work)
        return self._sum(work) if isinstance(work, Sum) else self._product(work)

    def _product(self, work: Product) -> int:
        from llmevo.merge import product_kernels

        own, terms = work.sum, work.terms
        sources = tuple(self._view(slot) for slot in own.sources)
        worst = product_kernels.product(
            self._view(own.out),
            sources[0] if own.base is None else self._view(own.base),
            sources,
            np.array(own.weights, dtype=np.float32),
            own.base is not None,
            tuple(self._view(term.up).reshape(-1, term.rank) for term in terms),
            tuple(self._view(term.down).reshape(term.rank, -1) for term in terms),
            np.array([term.weight for term in terms], dtype=np.float32),
            work.columns,
        )
        return int(worst)

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

    def _masked(self, work: Masked) -> int:
        from llmevo.merge import mask_kernels

        masks = work.masks
        worst = mask_kernels.masked(
            self._view(work.out),
            self._view(work.base),
            tuple(self._view(slot) for slot in work.sources),
            tuple(_no_ranks() if mask.ranks is None else self._view(mask.ranks) for mask in masks),
            np.array([_KINDS[mask.kind] for mask in masks], dtype=np.int64),
            np.array([mask.low for mask in masks], dtype=np.uint32),
            np.array([mask.high for mask in masks], dtype=np.uint32),
            np.array([mask.key for mask in masks], dtype=np.uint32),
            np.array([mask.scale for mask in masks], dtype=np.float32),
            np.array(work.weights, dtype=np.float32),
            work.first,
            work.elect,
            work.normalize,
            np.float32(work.factor),
        )
        return int(worst)

    def _look(self) -> None:
        """See the buffers that the arena got since the last call."""
        for buffer in self._arena.buffers[len(self._arrays) :]:
            self._arrays.append(_array(buffer))

    def _view(self, slot: Slot) -> Any:
        return self._arrays[slot.buffer][slot.start : slot.stop]


def _no_ranks() -> Any:
    return np.empty(0, dtype=np.uint8)


def _array(buffer: torch.Tensor) -> Any:
    """View a buffer as numpy; bfloat16, which numpy has not, as uint16, and float16 as int16."""
    import torch

    held = {torch.bfloat16: torch.uint16, torch.float16: torch.int16}.get(buffer.dtype)
    return (buffer if held is None else buffer.view(held)).numpy()
