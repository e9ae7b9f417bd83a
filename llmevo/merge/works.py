"""What an engine is asked to do: plain data, over ranges of an arena's buffers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, final

from llmevo.merge.layout import Slot

Kind = Literal["window", "random", "ranked"]
# The largest magnitude that a float32 has.
LARGEST = 0x7F7FFFFF


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


@final
@dataclass(frozen=True, slots=True)
class Mask:
    """Which elements of a difference are kept.

    Args:
        kind: `window`: those whose magnitude, as the bits of a float32, is from `low` to `high`; `random`:
            those whose noise is below `high`; `ranked`: those whose noise is below `low + rank * high`.
        low: From 0 to 2^32 - 1.
        high: From 0 to 2^32 - 1.
        key: Two keys of the noise, below 2^32 each.
        ranks: `ranked` only: each element's rank in its row by magnitude, from 0 to 255.
        scale: Factor of what is kept.
    """

    kind: Kind = "window"
    low: int = 0
    high: int = LARGEST
    key: tuple[int, int] = (0, 0)
    ranks: Slot | None = None
    scale: float = 1.0


@final
@dataclass(frozen=True, slots=True)
class Masked:
    """A base and the weighted sum of masked differences from it; see `mask_kernels.masked`.

    Args:
        out: Where the result goes.
        base: As long as `out`.
        sources: As long as `out`, each.
        weights: One float for each source, in the sources' precision.
        masks: One for each source.
        elect: Whether only the majority sign of an element counts.
        normalize: Whether the sum is divided by the weights that count.
        factor: mergekit's `lambda`.
        first: The noise's counter for the first element.
    """

    out: Slot
    base: Slot
    sources: tuple[Slot, ...]
    weights: tuple[float, ...]
    masks: tuple[Mask, ...]
    elect: bool
    normalize: bool
    factor: float
    first: int = 0

    @property
    def size(self) -> int:
        """Elements to write."""
        return self.out.stop - self.out.start

    def part(self, low: int, high: int) -> Masked:
        """The same work on a range of elements."""
        masks = tuple(
            mask if mask.ranks is None else replace(mask, ranks=_cut(mask.ranks, low, high))
            for mask in self.masks
        )
        return replace(
            self,
            out=_cut(self.out, low, high),
            base=_cut(self.base, low, high),
            sources=tuple(_cut(source, low, high) for source in self.sources),
            masks=masks,
            first=self.first + low,
        )


Work = Sum | Masked


class Engine(Protocol):
    """Runs pieces of work on an arena's buffers, and measures differences between them.

    Attributes:
        name: For records, and part of a merge's identity: engines may differ in one rounding.
    """

    name: str

    def run(self, works: Sequence[Work]) -> list[int]:
        """Do the work; return the indices of those whose result has a value that is not finite."""
        ...

    def histogram(self, base: Slot, source: Slot) -> Any:
        """Count the magnitudes of `source - base` by their 2^15 bfloat16 patterns, as an integer array."""
        ...

    def mass_by_noise(self, base: Slot, source: Slot, key: tuple[int, int], buckets: int) -> Any:
        """Sum the magnitudes of `source - base` by the upper bits of their noise; `buckets` is 2^n."""
        ...

    def kept_mass(self, base: Slot, source: Slot, mask: Mask) -> float:
        """Sum the magnitudes of what a mask keeps of `source - base`."""
        ...


def _cut(slot: Slot, low: int, high: int) -> Slot:
    return Slot(slot.buffer, slot.start + low, slot.start + high)
