"""The fast mode: a recipe as one pass over flat buffers, and only over what changed since the last one."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, final

import numpy as np
from numpy.typing import NDArray

from llmevo.errors import StageError
from llmevo.merge import coefficients, masks, spherical
from llmevo.merge.coefficients import Method, Weights
from llmevo.merge.layout import Arena, Slot
from llmevo.merge.resolve import Resolved, Resolver, Skeleton, Target
from llmevo.merge.works import Engine, Product, Sum, Term, Work

if TYPE_CHECKING:
    import torch

    from llmevo.merge.adapters import Factor

# One row of numbers for each target: equal rows give equal tensors.
Rows = NDArray[np.floating[Any]]


# Elements of a block of dot products.
_BLOCK = 1 << 18

METHODS: dict[str, Method] = {
    "linear": coefficients.linear,
    "task_arithmetic": coefficients.task_arithmetic,
    "slerp": spherical.slerp,
    "nuslerp": spherical.nuslerp,
    "multislerp": spherical.multislerp,
    "karcher": spherical.karcher,
    "model_stock": spherical.model_stock,
}
# Variants that work row by row, and so are no weighted sums of whole tensors.
_WHOLE = {"nuslerp": ("nuslerp_flatten", True), "model_stock": ("filter_wise", False)}


@final
class Bound:
    """A structure whose tensors have been found in the buffers.

    Args:
        skeleton: The structure.
        arena: The buffers.
        outputs: Where the model's parameters lie, by name.

    Attributes:
        covers: Whether the structure writes each parameter exactly once.
        names: Of the targets, in the order of the output buffer.
        order: From that order to the skeleton's.
        out: The outputs' slots.
        sources: The models' slots for each target.
        base: Index of the base model; None where targets have none, or different ones.
        scales: What the products of the models' factors count, `[targets, models]`; 0 where there are none.
    """

    def __init__(self, skeleton: Skeleton, arena: Arena, outputs: Mapping[str, Slot]) -> None:
        targets = self._targets = skeleton.targets
        self._grams: dict[bool, NDArray[np.float64]] = {}
        known = [i for i, target in enumerate(targets) if target.name in outputs]
        self.order = sorted(known, key=lambda i: _place(outputs[targets[i].name]))
        self.names = [targets[i].name for i in self.order]
        self.out = [outputs[name] for name in self.names]
        fits = all(
            targets[i].tensors[0].numel() == slot.stop - slot.start
            for i, slot in zip(self.order, self.out, strict=True)
        )
        name, wanted = _WHOLE.get(skeleton.method, (None, None))
        whole = name is None or all(target.constants[name] is wanted for target in targets)
        self.covers = (
            whole
            and fits
            and len(known) == len(targets)
            and sorted(map(_place, self.out)) == sorted({_place(slot) for slot in outputs.values()})
        )
        self.sources = [tuple(arena.slot(tensor) for tensor in targets[i].tensors) for i in self.order]
        self.bases = [targets[i].base for i in self.order]
        # Models that have a tensor in common: the first of them stands for all.
        self.first = np.array([[row.index(slot) for slot in row] for row in self.sources])
        self._factors = [
            tuple(None if f is None else _slots(f, arena) for f in targets[i].factors) for i in self.order
        ]
        self._columns = [targets[i].tensors[0].shape[-1] for i in self.order]
        scales = [[0.0 if f is None else f.scale for f in targets[i].factors] for i in self.order]
        self.scales = np.array(scales)
        rows = [(out, *sources) for out, sources in zip(self.out, self.sources, strict=True)]
        follows = [False] + [
            all(a.precedes(b) for a, b in zip(*pair, strict=True)) for pair in itertools.pairwise(rows)
        ]
        self.follows = np.array(follows, dtype=bool)
        self.follows[1:] &= np.array([a == b for a, b in itertools.pairwise(self.bases)], dtype=bool)
        self.follows[1:] &= (self.first[1:] == self.first[:-1]).all(axis=1)
        whole = (self.scales == 0).all(axis=1)
        self.follows[1:] &= whole[1:] & whole[:-1]

    def grams(self, shifts: bool) -> NDArray[np.float64]:
        """Return the dot products of the models' tensors, or of their differences from the base; kept.

        They are `[targets, models, models]`, in the skeleton's order; of a base and its difference, 0.
        """
        if shifts not in self._grams:
            self._grams[shifts] = np.stack([_gram(target, shifts) for target in self._targets])
        return self._grams[shifts]

    def effective(self, weights: Weights) -> NDArray[np.float32]:
        """Return what each thing is multiplied with, in the output buffer's order; 0 for what adds nothing.

        Returns:
            `[targets, 2 x models]`: the weights of distinct tensors, and those of the products of factors.
        """
        values = weights.values[self.order]
        result = np.zeros_like(values)
        rows = np.arange(len(values))[:, None]
        np.add.at(result, (rows, self.first), values)
        if weights.shifts:
            bases = np.array(self.bases)
            result[rows[:, 0], self.first[rows[:, 0], bases]] = 0
        products = values.copy()
        if weights.shifts:
            # Differences are taken from the base's product too.
            products[rows[:, 0], bases] = 1 - values.sum(axis=1)
        with np.errstate(over="ignore", invalid="ignore"):
            return np.hstack([result, products * self.scales]).astype(np.float32)

    def work(self, start: int, stop: int, row: NDArray[np.float32], *, shifts: bool) -> Sum | Product:
        """Return the work of neighbouring targets with equal rows of `effective`."""
        weights, products = np.split(row, 2)
        base = self.bases[start] if shifts else None
        used = [j for j in range(len(weights)) if weights[j] != 0]
        # A sum needs something to be a sum of, if all weights are 0.
        if not used:
            used = [0]
        sources = tuple(_span(self.sources[start][j], self.sources[stop - 1][j]) for j in used)
        own = None if base is None else _span(self.sources[start][base], self.sources[stop - 1][base])
        plain = Sum(
            _span(self.out[start], self.out[stop - 1]), sources, tuple(map(float, weights[used])), own
        )
        terms = tuple(
            Term(*factor, float(weight))
            for factor, weight in zip(self._factors[start], products, strict=True)
            if factor is not None and weight != 0
        )
        return Product(plain, terms, self._columns[start]) if terms else plain


@final
class FastMerge:
    """Merges into the resident model's buffer; for methods in `METHODS` and `masks.METHODS`.

    Args:
        arena: The buffers of the models and of the resident model.
        engine: Runs the loops.
        resolver: Says what a recipe's tensors are merged with.
        outputs: Where the resident model's parameters lie, by name; tied ones have one place.
        dtype: Of the models in memory, which is the one that mergekit computes in.
    """

    def __init__(
        self,
        arena: Arena,
        engine: Engine,
        resolver: Resolver,
        outputs: Mapping[str, Slot],
        dtype: torch.dtype,
    ) -> None:
        self._arena = arena
        self._engine = engine
        self._resolver = resolver
        self._outputs = outputs
        self._dtype = dtype
        self._masks = masks.Masks(arena, engine)
        self._bound: dict[str, Bound] = {}
        self._last: tuple[str, Rows] | None = None

    def forget(self) -> None:
        """Write everything anew next time: the model may hold anything."""
        self._last = None

    def resolve(self, recipe: dict[str, Any]) -> Resolved | None:
        """Return the recipe with its parameters resolved; None if it has no fast form."""
        method = recipe.get("merge_method")
        if method not in METHODS and method not in masks.METHODS:
            return None
        wanted = str(self._dtype).removeprefix("torch.")
        if recipe.get("dtype") not in (None, wanted) or recipe.get("out_dtype") not in (None, wanted):
            return None
        resolved = self._resolver.resolve(recipe)
        if resolved is None or (method in masks.METHODS and not masks.takes(resolved)):
            return None
        return resolved if self._bind(resolved.skeleton).covers else None

    def _bind(self, skeleton: Skeleton) -> Bound:
        bound = self._bound.get(skeleton.key)
        if bound is None:
            bound = self._bound[skeleton.key] = Bound(skeleton, self._arena, self._outputs)
        return bound

    def merge(self, resolved: Resolved, seed: int) -> int:
        """Write what changed, and return the bytes written.

        Raises:
            StageError: If a value is not finite. Everything is written anew next time.
        """
        skeleton = resolved.skeleton
        bound = self._bind(skeleton)
        last, self._last = self._last, None
        rows: Rows
        if skeleton.method in masks.METHODS:
            rows = self._masks.rows(resolved, seed)[bound.order]
            changed = self._changed(skeleton, rows, last)
            spans = [(i, i + 1) for i in np.flatnonzero(changed).tolist()]
            works: list[Work] = [
                self._masks.work(resolved, bound.order[i], bound.out[i], bound.sources[i], seed)
                for i, _ in spans
            ]
        else:
            weights = METHODS[skeleton.method](resolved, self._dtype, bound.grams)
            rows = bound.effective(weights)
            changed = self._changed(skeleton, rows, last)
            spans = _spans(rows, changed, bound.follows)
            works = [bound.work(a, b, rows[a], shifts=weights.shifts) for a, b in spans]
        bad = self._engine.run(works)
        if bad:
            raise StageError("merge", self._complaint(bound, *spans[bad[0]]))
        self._last = (skeleton.key, rows)
        width = self._arena.buffers[bound.out[0].buffer].element_size()
        return sum(bound.out[i].stop - bound.out[i].start for i in np.flatnonzero(changed)) * width

    def _changed(self, skeleton: Skeleton, rows: Rows, last: tuple[str, Rows] | None) -> NDArray[np.bool_]:
        if last is None or last[0] != skeleton.key:
            return np.ones(len(rows), dtype=bool)
        changed: NDArray[np.bool_] = (rows != last[1]).any(axis=1)
        return changed

    def _complaint(self, bound: Bound, start: int, stop: int) -> str:
        import torch

        for index in range(start, stop):
            slot = bound.out[index]
            if not bool(torch.isfinite(self._arena.buffers[slot.buffer][slot.start : slot.stop]).all()):
                return f"tensor `{bound.names[index]}` has values that are NaN or infinite after merging"
        return "the merge has values that are NaN or infinite"


def _spans(rows: Rows, changed: NDArray[np.bool_], follows: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """Return ranges of neighbouring, changed targets with equal rows."""
    joins = follows.copy()
    joins[1:] &= (rows[1:] == rows[:-1]).all(axis=1) & changed[:-1]
    spans: list[tuple[int, int]] = []
    for index in np.flatnonzero(changed).tolist():
        if joins[index]:
            spans[-1] = (spans[-1][0], index + 1)
        else:
            spans.append((index, index + 1))
    return spans


def _gram(target: Target, shifts: bool) -> NDArray[np.float64]:
    """Multiply tensors with each other in float64, a block at a time."""
    import torch

    added = [target.difference(j) for j in range(len(target.tensors))]
    flat = [
        (tensor if delta is None else tensor.float() + delta).reshape(-1)
        for tensor, delta in zip(target.tensors, added, strict=True)
    ]
    if any(delta is not None for delta in added):
        flat = [tensor.float() for tensor in flat]
    gram = torch.zeros(len(flat), len(flat), dtype=torch.float64, device=flat[0].device)
    for low in range(0, flat[0].numel(), _BLOCK):
        block = torch.stack([tensor[low : low + _BLOCK] for tensor in flat])
        if shifts and target.base is not None:
            block = block - block[target.base]
        block = block.double()
        gram += block @ block.T
    result: NDArray[np.float64] = gram.cpu().numpy()
    return result


def _slots(factor: Factor, arena: Arena) -> tuple[Slot, Slot, int]:
    return arena.slot(factor.up), arena.slot(factor.down), factor.down.shape[0]


def _span(first: Slot, last: Slot) -> Slot:
    return Slot(first.buffer, first.start, last.stop)


def _place(slot: Slot) -> tuple[int, int]:
    return slot.buffer, slot.start
