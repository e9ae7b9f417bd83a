"""What an engine is asked to do: plain data, over ranges of an arena's buffers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
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
class Term:
    """A product of two thin matrices, `weight * up @ down`, in float32.

    Args:
        up: `[rows, rank]`.
        down: `[rank, columns]`.
        rank: Of the product.
        weight: Factor of all of it.
    """

    up: Slot
    down: Slot
    rank: int
    weight: float


@final
@dataclass(frozen=True, slots=True)
class Product:
    """A matrix that is a sum, and products of thin matrices added to it before it is rounded.

    Args:
        sum: Where the result goes, and what the products are added to.
        terms: At least one.
        columns: Of the matrix; `part` takes whole rows.
    """

    sum: Sum
    terms: tuple[Term, ...]
    columns: int

    @property
    def size(self) -> int:
        """Elements to write."""
        return self.sum.size

    def part(self, low: int, high: int) -> Product:
        """The same work on a range of elements, which must be whole rows."""
        first, last = low // self.columns, high // self.columns
        terms = tuple(
            replace(term, up=_cut(term.up, first * term.rank, last * term.rank)) for term in self.terms
        )
        return Product(self.sum.part(low, high), terms, self.columns)


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

    def moved(self, places: Mapping[Slot, Slot]) -> Mask:
        """The same mask, its ranks elsewhere."""
        return self if self.ranks is None else replace(self, ranks=places[self.ranks])


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


Work = Sum | Masked | Product


def pieces(work: Work, size: int) -> Iterator[Work]:
    """Cut work into parts of about `size` elements, and matrices between rows."""
    unit = work.columns if isinstance(work, Product) else 1
    step = max(1, size // unit) * unit
    for low in range(0, work.size, step):
        yield work.part(low, min(low + step, work.size))


def reads(work: Work) -> list[Slot]:
    """Return all that some work reads."""
    if isinstance(work, Product):
        return [*reads(work.sum), *(slot for term in work.terms for slot in (term.up, term.down))]
    base = [] if work.base is None else [work.base]
    ranks = [m.ranks for m in work.masks if m.ranks is not None] if isinstance(work, Masked) else []
    return [*base, *work.sources, *ranks]


def moved(work: Work, places: Mapping[Slot, Slot]) -> Work:
    """Return the same work on what lies elsewhere: `places` says where each of `reads` is."""
    if isinstance(work, Product):
        own = moved(work.sum, places)
        assert isinstance(own, Sum)
        terms = tuple(replace(term, up=places[term.up], down=places[term.down]) for term in work.terms)
        return replace(work, sum=own, terms=terms)
    base, sources = work.base, tuple(places[source] for source in work.sources)
    if isinstance(work, Sum):
        return replace(work, sources=sources, base=None if base is None else places[base])
    masks = tuple(mask.moved(places) for mask in work.masks)
    return replace(work, sources=sources, base=places[work.base], masks=masks)


def output(work: Work) -> Slot:
    """Return where the result of some work goes."""
    return work.sum.out if isinstance(work, Product) else work.out


class Engine(Protocol):
    """Runs pieces of work on an arena's buffers, and measures differences between them.

    Attributes:
        name: For records, and part of a merge's identity: engines may differ in one rounding.
    """

    name: str

    def run(self, works: Sequence[Work]) -> list[int]:
        """Do the work; return the indices of those whose result has a value that is not finite."""
        ...

    def histogram(self, base: Slot, source: Slot, within: int | None = None) -> Any:
        """Count the magnitudes of `source - base` by their bits as float32, as an integer array.

        By the upper 15 bits, which are all that bfloat16 has; or, `within` these, by the lower 16.
        """
        ...

    def mass_by_noise(self, base: Slot, source: Slot, key: tuple[int, int], buckets: int) -> Any:
        """Sum the magnitudes of `source - base` by the upper bits of their noise; `buckets` is 2^n."""
        ...

    def kept_mass(self, base: Slot, source: Slot, mask: Mask) -> float:
        """Sum the magnitudes of what a mask keeps of `source - base`."""
        ...


def _cut(slot: Slot, low: int, high: int) -> Slot:
    return Slot(slot.buffer, slot.start + low, slot.start + high)
