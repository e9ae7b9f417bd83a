"""Methods on directions and angles of whole tensors, from their dot products alone.

slerp, nuslerp, multislerp, karcher and model_stock give sums of their inputs whose weights follow from norms
and angles. These do not change during a search, so that a merge is again one pass.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from llmevo.errors import StageError
from llmevo.merge.coefficients import Grams, Weights, flags, rounded
from llmevo.merge.resolve import Numbers, Resolved

if TYPE_CHECKING:
    import torch


def slerp(resolved: Resolved, dtype: torch.dtype, grams: Grams) -> Weights:
    """Along the great circle from the base to the other model; along the line where they are parallel."""
    gram = grams(False)
    base, other = _ends(resolved)
    rows = np.arange(len(gram))
    t = resolved.values["t"][:, 0]
    norms = np.sqrt(np.diagonal(gram, axis1=1, axis2=2))
    norms = np.where(norms > 1e-8, norms, 1.0)
    dot = np.clip(gram[rows, base, other] / (norms[rows, base] * norms[rows, other]), -1, 1)
    near, far = _arc(dot, t, straight=np.abs(dot) > 0.9995)
    values = np.zeros((len(gram), 2))
    values[rows, base], values[rows, other] = near, far
    return Weights(values, shifts=False)


def nuslerp(resolved: Resolved, dtype: torch.dtype, grams: Grams) -> Weights:
    """Along the great circle between two models, or between their differences from the base."""
    shifts, used = _non_base(resolved)
    gram, weight = _among(grams(shifts), used), np.take_along_axis(resolved.values["weight"], used, 1)
    total = weight.sum(axis=1)
    small = np.abs(total) < 1e-6
    t = np.where(small, 0.5, weight[:, 1] / np.where(small, 1.0, total))
    norms = np.maximum(np.sqrt(np.diagonal(gram, axis1=1, axis2=2)), 1e-7)
    dot = np.clip(gram[:, 0, 1] / (norms[:, 0] * norms[:, 1]), -1, 1)
    near, far = _arc(dot, t, straight=1 - dot**2 <= 1e-16)
    return _spread(resolved, np.stack([near, far], axis=1), used, shifts=shifts)


def multislerp(resolved: Resolved, dtype: torch.dtype, grams: Grams) -> Weights:
    """The direction of the weighted mean of unit vectors, with the weighted mean of their norms.

    mergekit's way over the tangent space at that mean leads back to it: the weighted sum of the tangents is 0
    but for rounding.
    """
    shifts, used = _non_base(resolved)
    if used.shape[1] == 1:
        return _spread(resolved, np.ones(used.shape), used, shifts=False)
    gram, weight = _among(grams(shifts), used), np.take_along_axis(resolved.values["weight"], used, 1)
    eps = resolved.values["eps"]
    weight = rounded(weight, dtype)
    with np.errstate(all="ignore"):
        share = rounded(weight / rounded(weight.sum(axis=1, keepdims=True), dtype), dtype)
    weight = np.where(flags(resolved, "normalize_weights"), share, weight)
    norms = np.sqrt(np.diagonal(gram, axis1=1, axis2=2))
    units = weight / (norms + eps)
    length = np.sqrt(np.maximum(np.einsum("ti,tij,tj->t", units, gram, units), 0))[:, None]
    opposed = length < eps
    if opposed.any() and used.shape[1] > 2:
        raise StageError("merge", "the models' weighted directions add up to nothing: change the weights")
    with np.errstate(all="ignore"):
        values = units / length * (norms * weight).sum(axis=1, keepdims=True)
    return _spread(resolved, np.where(opposed, weight, values), used, shifts=shifts)


def karcher(resolved: Resolved, dtype: torch.dtype, grams: Grams) -> Weights:
    """The point of the sphere with the least squared angles to all models, and the mean of their norms."""
    gram = grams(False)
    count = gram.shape[1]
    tol = resolved.values["tol"]
    if count == 1:
        return Weights(np.ones((len(gram), 1)), shifts=False)
    norms = np.sqrt(np.diagonal(gram, axis1=1, axis2=2))
    valid = norms > tol
    safe = np.where(valid, norms, 1.0)
    cosines = gram / (safe[:, :, None] * safe[:, None, :]) * (valid[:, :, None] & valid[:, None, :])
    share = valid / np.maximum(valid.sum(axis=1, keepdims=True), 1)
    length = _lengths(share, cosines)
    first = np.eye(count)[np.argmax(valid, axis=1)]
    mean = np.where(length < tol, first, share / np.where(length == 0, 1.0, length))
    limits = np.array([target.constants["max_iter"] for target in resolved.skeleton.targets])[:, None]
    active = valid.any(axis=1, keepdims=True)
    for step in range(int(limits.max())):
        active &= step < limits
        moved, size = _towards(mean, cosines, share, valid, tol)
        active &= (size >= tol) & (size > 0)  # a tolerance of 0 never ends it otherwise
        if not active.any():
            break
        mean = np.where(active, moved, mean)
    scale = norms.mean(axis=1, keepdims=True)
    return Weights(np.where(valid, mean * scale / safe, 0.0), shifts=False)


def model_stock(resolved: Resolved, dtype: torch.dtype, grams: Grams) -> Weights:
    """From the base to the mean of the models, as far as the angles between them say."""
    shifts, used = _non_base(resolved)
    gram = _among(grams(shifts), used)
    count = used.shape[1]
    norms = np.sqrt(np.diagonal(gram, axis1=1, axis2=2))
    a, b = np.triu_indices(count, 1)
    cosines = np.clip(gram[:, a, b] / np.maximum(norms[:, a] * norms[:, b], 1e-6), -1, 1).mean(axis=1)
    below = 1 + (count - 1) * cosines
    singular = np.abs(below) < 1e-6
    t = np.where(singular, 0.0, count * cosines / np.where(singular, 1.0, below))
    return _spread(resolved, np.repeat(t[:, None] / count, count, axis=1), used, shifts=shifts)


def _arc(dot: Numbers, t: Numbers, *, straight: np.ndarray) -> tuple[Numbers, Numbers]:
    theta = np.arccos(np.where(straight, 0.0, dot))
    sine = np.sin(theta)
    near = np.where(straight, 1 - t, np.sin((1 - t) * theta) / sine)
    far = np.where(straight, t, np.sin(t * theta) / sine)
    return near, far


def _towards(
    mean: Numbers, cosines: Numbers, share: Numbers, valid: np.ndarray, tol: Numbers
) -> tuple[Numbers, Numbers]:
    """Return the mean after one step along the sphere, and the step's length."""
    dots = np.clip(np.einsum("tij,tj->ti", cosines, mean), -1, 1)
    theta = np.arccos(dots)
    with np.errstate(all="ignore"):
        pull = np.where(valid & (theta >= tol) & (theta > 0), share * theta / np.sin(theta), 0.0)
        tangent = pull - mean * (pull * dots).sum(axis=1, keepdims=True)
        size = _lengths(tangent, cosines)
        moved = np.cos(size) * mean + np.sin(size) * tangent / size
        length = _lengths(moved, cosines)
        return np.where(length > tol, moved / length, moved), size


def _lengths(weights: Numbers, cosines: Numbers) -> Numbers:
    """Return the lengths of sums of unit vectors, `[targets, 1]`."""
    squares = np.einsum("ti,tij,tj->t", weights, cosines, weights)
    lengths: Numbers = np.sqrt(np.maximum(squares, 0))[:, None]
    return lengths


def _ends(resolved: Resolved) -> tuple[np.ndarray, np.ndarray]:
    base = np.array([target.base for target in resolved.skeleton.targets])
    return base, 1 - base


def _non_base(resolved: Resolved) -> tuple[bool, np.ndarray]:
    """Return whether there is a base, and for each target the indices of the other models."""
    targets = resolved.skeleton.targets
    used = [[j for j in range(len(t.models)) if j != t.base] for t in targets]
    return targets[0].base is not None, np.array(used)


def _among(gram: Numbers, used: np.ndarray) -> Numbers:
    """Return the dot products among some of the models."""
    among: Numbers = gram[np.arange(len(used))[:, None, None], used[:, :, None], used[:, None, :]]
    return among


def _spread(resolved: Resolved, values: Numbers, used: np.ndarray, *, shifts: bool) -> Weights:
    """Put weights of the models beside the base into columns for all of them."""
    spread = np.zeros((len(values), len(resolved.skeleton.targets[0].models)))
    spread[np.arange(len(values))[:, None], used] = values
    return Weights(spread, shifts)
