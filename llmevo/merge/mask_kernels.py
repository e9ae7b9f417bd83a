"""Sums of masked differences on the CPU, compiled by numba: TIES, DARE, DELLA, breadcrumbs.

The products are rounded as mergekit rounds them, so that signs are elected alike; their sum is not.
"""

from __future__ import annotations

import numpy as np

from llmevo.merge.cells import BLOCK, fit, get, jit, magnitude, noise, put, wide

# How a source's elements are chosen; see `works.Mask`.
WINDOW, RANDOM, RANKED = 0, 1, 2


@jit
def kept(x, base, a, ranks, kind, low, high, key, other, first):
    """Write the kept differences from the base into `x`, and 0 for the others."""
    wide()
    zero = np.float32(0)
    if kind == 0:
        for i in range(x.size):
            d = fit(base, get(a, i) - get(base, i))
            bits = magnitude(d)
            x[i] = d if low <= bits and bits <= high else zero
    elif kind == 1:
        for i in range(x.size):
            d = fit(base, get(a, i) - get(base, i))
            x[i] = d if noise(np.uint32(first + i), key, other) < high else zero
    else:
        for i in range(x.size):
            d = fit(base, get(a, i) - get(base, i))
            limit = np.uint32(low + np.uint32(ranks[i]) * high)
            x[i] = d if noise(np.uint32(first + i), key, other) < limit else zero


@jit
def scaled(x, total, base, scale, weight):
    """Multiply kept differences by their scale and weight, each product rounded, and add them to `total`."""
    wide()
    if scale != np.float32(1):
        for i in range(x.size):
            x[i] = fit(base, x[i] * scale)
    for i in range(x.size):
        d = fit(base, x[i] * weight)
        x[i] = d
        total[i] += d


@jit
def agree(x, sign, total, divisor, weight):
    """Add to `total` what has the elected sign, and its weight to `divisor`."""
    wide()
    zero = np.float32(0)
    for i in range(x.size):
        same = x[i] * sign[i] > zero
        total[i] += x[i] if same else zero
        divisor[i] += weight if same else zero


@jit
def masked(
    out, base, sources, ranks, kinds, lows, highs, keys, scales, weights, first, elect, normalize, lam
):
    """`out = base + lam * sum(weights * scales * masks * (sources - base)) / divisor`.

    With `elect`, an element counts only the sources that have its majority sign, and the divisor is the sum
    of their weights (1 where that is 0); without, it is that of all weights. Without `normalize` it is 1.
    """
    wide()
    count = len(sources)
    x = np.empty((count, BLOCK), np.float32)
    total = np.empty(BLOCK, np.float32)
    sign = np.empty(BLOCK, np.float32)
    divisor = np.empty(BLOCK, np.float32)
    worst = np.uint32(0)
    zero, one = np.float32(0), np.float32(1)
    constant = one
    if normalize and not elect:
        every = zero
        for j in range(count):
            every += weights[j]
        constant = fit(base, every)
        if abs(constant) < np.float32(1e-8):
            constant = one
    for start in range(0, out.size, BLOCK):
        size = min(BLOCK, out.size - start)
        origin = base[start : start + size]
        part = out[start : start + size]
        for i in range(size):
            total[i] = zero
        for j in range(count):
            row = x[j][:size]
            a = sources[j][start : start + size]
            r = ranks[j][start : start + size]
            kept(row, origin, a, r, kinds[j], lows[j], highs[j], keys[j, 0], keys[j, 1], first + start)
            scaled(row, total[:size], origin, scales[j], weights[j])
        if elect:
            for i in range(size):
                sign[i] = one if total[i] >= zero else -one
                total[i] = zero
                divisor[i] = zero
            for j in range(count):
                agree(x[j][:size], sign[:size], total[:size], divisor[:size], weights[j])
        if elect and normalize:
            for i in range(size):
                by = one if divisor[i] == zero else divisor[i]
                worst = max(worst, put(part, origin, i, get(origin, i) + total[i] / by * lam))
        else:
            by = lam / constant
            for i in range(size):
                worst = max(worst, put(part, origin, i, get(origin, i) + total[i] * by))
    return worst


@jit
def histogram(base, a, counts):
    """Count the upper 15 bits of the differences' magnitudes, as float32."""
    for i in range(a.size):
        counts[magnitude(fit(base, get(a, i) - get(base, i))) >> np.uint32(16)] += 1


@jit
def histogram_within(base, a, upper, counts):
    """Count the lower 16 bits of the magnitudes that have these upper ones."""
    for i in range(a.size):
        bits = magnitude(fit(base, get(a, i) - get(base, i)))
        if bits >> np.uint32(16) == upper:
            counts[bits & np.uint32(0xFFFF)] += 1


@jit
def mass_by_noise(base, a, key, other, table):
    """Add each difference's magnitude to the bucket of its noise's upper bits."""
    shift = np.uint32(32)
    size = table.size
    while size > 1:
        size >>= 1
        shift -= np.uint32(1)
    for i in range(a.size):
        d = fit(base, get(a, i) - get(base, i))
        table[noise(np.uint32(i), key, other) >> shift] += abs(d)


@jit
def kept_mass(base, a, ranks, kind, low, high, key, other):
    """Return the sum of the magnitudes of the kept differences."""
    x = np.empty(BLOCK, np.float32)
    result = 0.0
    for start in range(0, a.size, BLOCK):
        size = min(BLOCK, a.size - start)
        stop = start + size
        kept(x[:size], base[start:stop], a[start:stop], ranks[start:stop], kind, low, high, key, other, start)
        for i in range(size):
            result += abs(x[i])
    return result
