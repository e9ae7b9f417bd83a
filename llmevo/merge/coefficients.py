"""Methods that are weighted sums of whole tensors: one weight for each model and tensor.

A method here returns `Weights`: what each model's tensor counts, and whether the models themselves or their
differences from the base are added up. The definitions are those of mergekit 0.1.5.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

import numpy as np
from numpy.typing import NDArray

from llmevo.merge.resolve import Numbers, Resolved

if TYPE_CHECKING:
    import torch


@final
@dataclass(frozen=True, slots=True)
class Weights:
    """The weights of a merge.

    Args:
        values: `[targets, models]`; 0 for the base model where `shifts`.
        shifts: Whether `base + sum(weight * (model - base))` is meant, or `sum(weight * model)`.
    """

    values: Numbers
    shifts: bool


# Dot products of the models' tensors, or of their differences from the base, `[targets, models, models]`.
Grams = Callable[[bool], Numbers]
Method = Callable[[Resolved, "torch.dtype", Grams], Weights]


def linear(resolved: Resolved, dtype: torch.dtype, grams: Grams) -> Weights:
    """The weighted mean or sum; weights that add up to 0 give values that are not finite."""
    weight = resolved.values["weight"]
    with np.errstate(all="ignore"):
        total = weight.sum(axis=1, keepdims=True)
        return Weights(np.where(flags(resolved, "normalize"), weight / total, weight), shifts=False)


def task_arithmetic(resolved: Resolved, dtype: torch.dtype, grams: Grams) -> Weights:
    """The base and a weighted sum of differences; mergekit has the weights and their sum in `dtype`."""
    weight = rounded(np.nan_to_num(resolved.values["weight"]), dtype)
    total = rounded(weight.sum(axis=1, keepdims=True), dtype)
    total = np.where(np.abs(total) < 1e-8, 1.0, total)
    weight = np.where(flags(resolved, "normalize"), weight / total, weight)
    return Weights(weight * resolved.values["lambda"], shifts=True)


def rounded(values: Numbers, dtype: torch.dtype) -> Numbers:
    """Round numbers to a dtype's precision, to nearest even."""
    import torch

    result: Numbers = torch.from_numpy(np.ascontiguousarray(values)).to(dtype).double().numpy()
    return result


def flags(resolved: Resolved, name: str) -> NDArray[np.bool_]:
    """Return a parameter that is true or false, `[targets, 1]`."""
    targets: Sequence[object] = [target.constants[name] for target in resolved.skeleton.targets]
    return np.array(targets, dtype=bool)[:, None]
