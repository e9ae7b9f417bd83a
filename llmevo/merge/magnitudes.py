"""What masks need to know of a difference between two tensors; it does not depend on the recipe."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from typing import final

import numpy as np

from llmevo.merge.layout import Slot
from llmevo.merge.works import LARGEST, Engine, Mask

# Buckets of the noise's upper bits in which a difference's mass is held, and the size from which it is done.
_BUCKETS = 1024
_LARGE = 1 << 16
# mergekit leaves a sum smaller than this as it is.
_TINY = 1e-7


@final
class Magnitudes:
    """One difference: its magnitudes in order, and how much of it masks keep.

    Magnitudes of bfloat16 differences have at most 2^15 values, so that a histogram over them is the sorted
    list of all magnitudes, and the k-th largest a look-up. For float16 and float32 it says in which of the
    bfloat16 intervals the k-th largest lies, and a second histogram, of that interval alone, which one it is.

    Args:
        engine: Measures the difference.
        base: What is subtracted.
        source: What it is subtracted from.
        key: Of the noise.
        ranks: Where the ranks of DELLA lie; None for other methods.
        dtype: Of the tensors, as torch names it.
    """

    def __init__(
        self,
        engine: Engine,
        base: Slot,
        source: Slot,
        key: tuple[int, int],
        ranks: Slot | None = None,
        dtype: str = "bfloat16",
    ) -> None:
        self._engine = engine
        self._base = base
        self._source = source
        self._key = key
        self._ranks = ranks
        self._dtype = dtype
        # mergekit draws masks in float32 where the models are in float16.
        self._drawing = "float32" if dtype == "float16" else dtype
        self._masses: dict[Mask, float] = {}
        self._found: dict[int, int] = {}
        self.size = source.stop - source.start

    def largest(self, density: float, *, rescale: bool) -> Mask:
        """Keep the share `density` of the largest, at least one.

        Elements that equal the smallest kept one in magnitude are all kept; mergekit keeps some of them.
        """
        if density >= 1:
            return Mask()
        if density <= 0:
            return nothing()
        count = max(1, int(density * self.size))
        low = self._magnitude(self.size - count)
        return self._window(low, LARGEST, rescale=rescale)

    def middle(self, density: float, gamma: float, *, rescale: bool) -> Mask:
        """Drop the share `gamma` of the largest, then the smallest, until the share `density` is left.

        Elements that equal the smallest or the largest kept one in magnitude are all kept.
        """
        if density >= 1:
            return Mask()
        target, top = int(density * self.size), int(gamma * self.size)
        bottom = max(0, self.size - target - top)
        stop = min(bottom + target, self.size)
        if target <= 0 or stop <= bottom:
            return nothing()
        return self._window(self._magnitude(bottom), self._magnitude(stop - 1), rescale=rescale)

    def drawn(self, density: float, *, rescale: bool) -> Mask:
        """Keep each element with the probability `density`, which is rounded to the dtype as in mergekit."""
        if density >= 1:
            return Mask()
        high = round(rounded(density, self._drawing) * 2**32)
        if high >= 1 << 32:
            return Mask()
        mask = Mask("random", high=high, key=self._key)
        return self._scaled(mask, self._mass_below, self._drawing) if rescale else mask

    def by_rank(self, density: float, epsilon: float, *, rescale: bool) -> Mask:
        """Keep each element with a probability that rises with its rank, by 2 epsilon about the density."""
        if density >= 1:
            return Mask()
        if density <= 0:
            return nothing()
        low, step = round((density - epsilon) * 2**32), round(2 * epsilon * 2**32 / 255)
        mask = Mask("ranked", low=low, high=step, key=self._key, ranks=self._ranks)
        return self._scaled(mask, self._mass, self._drawing) if rescale else mask

    @cached_property
    def _sorted(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Distinct upper halves of magnitudes in rising order as float32 bits, running counts, and sums."""
        counts = self._engine.histogram(self._base, self._source)
        present = np.flatnonzero(counts)
        bits = present.astype(np.uint32) << np.uint32(16)
        sums = np.cumsum(bits.view(np.float32).astype(np.float64) * counts[present])
        return bits, np.cumsum(counts[present]), sums

    @cached_property
    def _running(self) -> np.ndarray:
        table = self._engine.mass_by_noise(self._base, self._source, self._key, _BUCKETS)
        return np.concatenate([[0.0], np.cumsum(table)])

    def _magnitude(self, rank: int) -> int:
        """Return the magnitude at a rank, from 0 for the smallest."""
        bits, counts, _ = self._sorted
        place = int(np.searchsorted(counts, rank, side="right"))
        upper = int(bits[place])
        if self._dtype == "bfloat16":
            return upper
        if rank not in self._found:
            inside = self._engine.histogram(self._base, self._source, within=upper >> 16)
            before = int(counts[place - 1]) if place else 0
            lower = int(np.searchsorted(np.cumsum(inside), rank - before, side="right"))
            self._found[rank] = upper | lower
        return self._found[rank]

    def _window(self, low: int, high: int, *, rescale: bool) -> Mask:
        mask = Mask(low=low, high=high)
        return self._scaled(mask, self._mass_within, self._dtype) if rescale else mask

    def _mass_within(self, mask: Mask) -> float:
        """Return what a window keeps; bfloat16's histogram knows it."""
        if self._dtype != "bfloat16":
            return self._mass(mask)
        bits, _, sums = self._sorted
        first, last = np.searchsorted(bits, mask.low), np.searchsorted(bits, mask.high, side="right") - 1
        return float(sums[last] - (sums[first - 1] if first else 0.0))

    def _mass(self, mask: Mask) -> float:
        if mask not in self._masses:
            self._masses[mask] = self._engine.kept_mass(self._base, self._source, mask)
        return self._masses[mask]

    def _mass_below(self, mask: Mask) -> float:
        """Return what a random mask keeps: exactly for small tensors, interpolated for large ones."""
        if self.size < _LARGE:
            return self._mass(mask)
        place = mask.high / 2**32 * _BUCKETS
        low = int(place)
        part = (place - low) * (self._running[low + 1] - self._running[low])
        return float(self._running[low] + part)

    def _scaled(self, mask: Mask, mass: Callable[[Mask], float], dtype: str) -> Mask:
        """Let what is kept have the magnitude of the whole, with the sums rounded as mergekit's are."""
        before, after = rounded(self._mass_within(Mask()), dtype), rounded(mass(mask), dtype)
        if before < _TINY or after < _TINY:
            return mask
        return replace(mask, scale=rounded(before / after, dtype))


def nothing() -> Mask:
    """Return a mask that keeps nothing."""
    return Mask(low=LARGEST, high=0)


def rounded(value: float, dtype: str = "bfloat16") -> float:
    """Round a finite number to a dtype's precision, to nearest even; too large a one to infinity."""
    with np.errstate(over="ignore"):
        if dtype != "bfloat16":
            return float(np.float32(value) if dtype == "float32" else np.float16(value))
        bits = int(np.float32(value).view(np.uint32))
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return float(np.uint32(bits).view(np.float32))
