"""Where a candidate's adapter starts that has parents: at the weighted sum of their changes, with noise."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import numpy as np

from llmevo.errors import GenomeError, StageError
from llmevo.train.adapters import Adapter
from llmevo.train.combine import PREFIX, read
from llmevo.train.products import Product, sketch, truncated, weighted_sum

if TYPE_CHECKING:
    import torch


@final
@dataclass(frozen=True, slots=True)
class Start:
    """What an individual of a population inherits.

    Args:
        parents: Folders of kept adapters, each with its weight in the sum; none for fresh weights.
        noise: Standard deviation of what is added to each factor, over the factor's root mean square.
        seed: Of the noise.
        generation: How many trainings the weights went through before.
    """

    parents: tuple[tuple[Path, float], ...] = ()
    noise: float = 0.0
    seed: int = 0
    generation: int = 0

    def order(self, seed: int) -> int:
        """The seed of the data's order: a generation of its own goes on where its parents did not read."""
        if self.generation == 0:
            return seed
        return int(np.random.SeedSequence([seed, self.generation]).generate_state(1)[0])


def inherit(adapter: Adapter, start: Start) -> None:
    """Set a fresh adapter's factors to the parents' weighted sum, at its own rank and scale; add the noise.

    A's rows get the length that they had when they were fresh, and B the rest, as in a trained LoRA, so that
    a step of AdamW means the same in every generation. What the parents' rank leaves of the adapter's stays
    fresh, with B zero, and learns. Modules that no parent has stay fresh too.

    Raises:
        StageError: A parent's adapter is gone, or does not fit the model.
    """
    import torch

    if not start.parents:
        return
    try:
        parents = [(weight, read(folder)[0]) for folder, weight in start.parents]
    except GenomeError as error:
        raise StageError("train", f"a parent's adapter is of no use: {error}") from None
    generator = torch.Generator().manual_seed(start.seed)
    with torch.no_grad():
        for name, (a, b, scale) in sorted(_layers(adapter)):
            terms = [(weight, products[name]) for weight, products in parents if name in products]
            if terms:
                _set(a, b, scale, weighted_sum(terms))
            for factor in (a, b):
                size = float(factor.norm()) / math.sqrt(factor.numel())
                noise = torch.randn(factor.shape, generator=generator)
                factor.add_((start.noise * size * noise).to(factor))


def _set(a: torch.Tensor, b: torch.Tensor, scale: float, whole: Product) -> None:
    found, _ = truncated(whole, len(a))
    length = float(a.norm()) / math.sqrt(len(a))
    a[: found.rank] = (length * found.down).to(a)
    b.zero_()
    b[:, : found.rank] = (found.up / (length * scale)).to(b)


def _layers(adapter: Adapter) -> Iterator[tuple[str, tuple[torch.Tensor, torch.Tensor, float]]]:
    """A, B and the scale of each module, by its name in the model."""
    for name, module in adapter.layers().items():
        pair = (side[adapter.name].weight for side in (module.lora_A, module.lora_B))
        yield name.removeprefix(PREFIX), (*pair, module.scaling[adapter.name])


def changes(adapter: Adapter) -> Mapping[str, Product]:
    """What an adapter adds to each module's weights."""
    return {
        name: Product(scale * b.detach().float(), a.detach().float())
        for name, (a, b, scale) in _layers(adapter)
    }


def fingerprint(adapter: Adapter, seed: int) -> dict[str, float]:
    """The sketch of an adapter's change as plain data: numbers by their place, to five digits."""
    numbers: Any = sketch(changes(adapter), seed).flatten().tolist()
    return {str(place): float(f"{number:.5g}") for place, number in enumerate(numbers)}
