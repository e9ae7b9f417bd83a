"""Methods on masked task vectors: TIES, DARE, DELLA and breadcrumbs, each tensor in one pass.

The definitions are those of mergekit 0.1.5. Random masks come from a hash of (seed, place of the model,
tensor, element), not from torch's generator: they have the same distribution, take no memory, are equal on
every device, and are nested, so that of two densities the smaller one keeps a part of what the larger keeps.
"""

from __future__ import annotations

import hashlib
from typing import final

import numpy as np

from llmevo.errors import StageError
from llmevo.merge.layout import Arena, Slot
from llmevo.merge.magnitudes import Magnitudes, rounded
from llmevo.merge.resolve import Numbers, Resolved
from llmevo.merge.works import Engine, Mask, Masked

# Whether the majority sign is elected, by method.
METHODS = {
    "ties": True,
    "dare_ties": True,
    "dare_linear": False,
    "della": True,
    "della_linear": False,
    "breadcrumbs": False,
    "breadcrumbs_ties": True,
}


def takes(resolved: Resolved) -> bool:
    """Whether masks are drawn here; mergekit's own arithmetic does what is left.

    Masks choose elements, which adapters' factors have not. A base model alone has no differences, and a
    negative `epsilon` would keep large ones less often.
    """
    epsilon = resolved.values.get("epsilon", np.zeros(1))
    alone = any(len(target.models) < 2 for target in resolved.skeleton.targets)
    return not (resolved.skeleton.factored or alone or bool((epsilon < 0).any()))


@final
class Masks:
    """Makes the work of masked merges; what it measures of the models is kept.

    Args:
        arena: The buffers.
        engine: Measures differences.
    """

    def __init__(self, arena: Arena, engine: Engine) -> None:
        self._arena = arena
        self._engine = engine
        self._known: dict[tuple[Slot, Slot, tuple[int, int], bool], Magnitudes] = {}
        self._ranks: dict[tuple[Slot, Slot], Slot] = {}

    def rows(self, resolved: Resolved, seed: int) -> Numbers:
        """Return one row for each target: equal rows give equal tensors."""
        skeleton = resolved.skeleton
        flags = ("normalize", "rescale")
        constants = [[float(target.constants[name]) for name in flags] for target in skeleton.targets]
        values = [resolved.values[name] for name in sorted(resolved.values)]
        # A seed is a whole number up to 2^64, a float64 holds 53 bits of it.
        seeds = [float(seed & 0xFFFFFFFF), float(seed >> 32)]
        random = skeleton.method.startswith(("dare", "della"))
        seeded = np.tile(seeds if random else [0.0, 0.0], (len(constants), 1))
        rows: Numbers = np.nan_to_num(np.hstack([*values, np.array(constants), seeded]))
        return rows

    def work(self, resolved: Resolved, index: int, out: Slot, slots: tuple[Slot, ...], seed: int) -> Masked:
        """Return the work of one target.

        Args:
            resolved: The recipe.
            index: Of the target in the skeleton.
            out: Where the result goes.
            slots: The models' tensors.
            seed: Of random masks.

        Raises:
            StageError: If a density, or a density with its epsilon, is no probability.
        """
        skeleton = resolved.skeleton
        target = skeleton.targets[index]
        assert target.base is not None
        base = slots[target.base]
        used = [j for j in range(len(slots)) if j != target.base]
        masks = [
            self._mask(skeleton.method, resolved, index, j, base, slots[j], _key(seed, j, target.name))
            for j in used
        ]
        weight = resolved.values["weight"][index]
        return Masked(
            out,
            base,
            tuple(slots[j] for j in used),
            tuple(rounded(float(weight[j]), self._dtype(base)) for j in used),
            tuple(masks),
            METHODS[skeleton.method],
            bool(target.constants["normalize"]),
            float(resolved.values["lambda"][index, 0]),
        )

    def _mask(
        self,
        method: str,
        resolved: Resolved,
        index: int,
        model: int,
        base: Slot,
        source: Slot,
        key: tuple[int, int],
    ) -> Mask:
        def value(name: str) -> float:
            return float(resolved.values[name][index, model])

        target = resolved.skeleton.targets[index]
        density, rescale = value("density"), bool(target.constants["rescale"])
        if source == base:  # a difference of 0, whatever is kept of it
            return Mask()
        if method == "ties":
            return self._of(base, source).largest(density, rescale=rescale)
        if method.startswith("breadcrumbs"):
            return self._of(base, source).middle(density, value("gamma"), rescale=rescale)
        if method.startswith("dare"):
            _check(density >= 0, f"`density` must be at least 0, not {density}")
            return self._of(base, source, key).drawn(density, rescale=rescale)
        epsilon = value("epsilon")
        if 0 < density < 1:
            _check(
                density + epsilon < 1 and density - epsilon > 0,
                f"`epsilon` must be such that density +/- epsilon is in (0, 1), not {epsilon} for {density}",
            )
            known = self._of(base, source, key, ranked=target.tensors[model].shape)
            return known.by_rank(density, epsilon, rescale=rescale)
        return self._of(base, source, key).by_rank(density, epsilon, rescale=rescale)

    def _of(
        self,
        base: Slot,
        source: Slot,
        key: tuple[int, int] = (0, 0),
        ranked: tuple[int, ...] | None = None,
    ) -> Magnitudes:
        known = self._known.get((base, source, key, ranked is not None))
        if known is None:
            ranks = None if ranked is None else self._rank(base, source, ranked)
            known = Magnitudes(self._engine, base, source, key, ranks, self._dtype(base))
            self._known[base, source, key, ranked is not None] = known
        return known

    def _dtype(self, slot: Slot) -> str:
        return str(self._arena.buffers[slot.buffer].dtype).removeprefix("torch.")

    def _rank(self, base: Slot, source: Slot, shape: tuple[int, ...]) -> Slot:
        """Return the ranks of a difference's magnitudes in each row, from 0 to 255; made once."""
        import torch

        if (base, source) not in self._ranks:
            views = [self._arena.buffers[s.buffer][s.start : s.stop] for s in (base, source)]
            delta = (views[1].float() - views[0].float()).to(views[1].dtype).abs()
            rows = delta.view(1, -1) if len(shape) < 2 else delta.view(shape[0], -1)
            order = rows.argsort(dim=1).argsort(dim=1)
            ranks = (order * 255 / max(1, rows.shape[1] - 1)).round().to(torch.uint8)
            self._ranks[base, source] = self._arena.slot(ranks.view(-1))
        return self._ranks[base, source]


def _key(seed: int, model: int, tensor: str) -> tuple[int, int]:
    """Return the keys of one model's noise in one tensor."""
    digest = hashlib.blake2b(f"{seed}/{model}/{tensor}".encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


def _check(holds: bool, reason: str) -> None:
    if not holds:
        raise StageError("merge", reason)
