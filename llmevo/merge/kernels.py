"""Weighted sums of buffers on the CPU, compiled by numba."""

from __future__ import annotations

import numpy as np

from llmevo.merge.cells import BLOCK, fit, get, jit, put, wide


@jit
def sum1(out, a, ca):
    """`out = ca * a`."""
    wide()
    worst = np.uint32(0)
    for i in range(out.size):
        worst = max(worst, put(out, a, i, get(a, i) * ca))
    return worst


@jit
def sum2(out, a, b, ca, cb):
    """`out = ca * a + cb * b`."""
    wide()
    worst = np.uint32(0)
    for i in range(out.size):
        worst = max(worst, put(out, a, i, get(a, i) * ca + get(b, i) * cb))
    return worst


@jit
def sum3(out, a, b, c, ca, cb, cc):
    """`out = ca * a + cb * b + cc * c`."""
    wide()
    worst = np.uint32(0)
    for i in range(out.size):
        worst = max(worst, put(out, a, i, get(a, i) * ca + get(b, i) * cb + get(c, i) * cc))
    return worst


@jit
def sum_many(out, sources, weights):
    """`out = sum(weights[j] * sources[j])`, block by block, two sources at a time."""
    wide()
    total = np.empty(BLOCK, np.float32)
    worst = np.uint32(0)
    count = len(sources)
    for low in range(0, out.size, BLOCK):
        size = min(BLOCK, out.size - low)
        for i in range(size):
            total[i] = np.float32(0)
        for j in range(0, count - 1, 2):
            a, b = sources[j][low : low + size], sources[j + 1][low : low + size]
            ca, cb = weights[j], weights[j + 1]
            for i in range(size):
                total[i] += get(a, i) * ca + get(b, i) * cb
        if count % 2:
            a, ca = sources[count - 1][low : low + size], weights[count - 1]
            for i in range(size):
                total[i] += get(a, i) * ca
        part = out[low : low + size]
        like = sources[0][low : low + size]
        for i in range(size):
            worst = max(worst, put(part, like, i, total[i]))
    return worst


@jit
def shift1(out, base, a, ca):
    """`out = base + ca * (a - base)`, the difference rounded as the sources are."""
    wide()
    worst = np.uint32(0)
    for i in range(out.size):
        z = get(base, i)
        worst = max(worst, put(out, base, i, z + fit(base, get(a, i) - z) * ca))
    return worst


@jit
def shift2(out, base, a, b, ca, cb):
    """`out = base + ca * (a - base) + cb * (b - base)`."""
    wide()
    worst = np.uint32(0)
    for i in range(out.size):
        z = get(base, i)
        step = fit(base, get(a, i) - z) * ca + fit(base, get(b, i) - z) * cb
        worst = max(worst, put(out, base, i, z + step))
    return worst


@jit
def shift3(out, base, a, b, c, ca, cb, cc):
    """`out = base + ca * (a - base) + cb * (b - base) + cc * (c - base)`."""
    wide()
    worst = np.uint32(0)
    for i in range(out.size):
        z = get(base, i)
        step = fit(base, get(a, i) - z) * ca + fit(base, get(b, i) - z) * cb + fit(base, get(c, i) - z) * cc
        worst = max(worst, put(out, base, i, z + step))
    return worst


@jit
def shift_many(out, base, sources, weights):
    """`out = base + sum(weights[j] * (sources[j] - base))`, block by block, two sources at a time."""
    wide()
    total = np.empty(BLOCK, np.float32)
    worst = np.uint32(0)
    count = len(sources)
    for low in range(0, out.size, BLOCK):
        size = min(BLOCK, out.size - low)
        origin = base[low : low + size]
        for i in range(size):
            total[i] = np.float32(0)
        for j in range(0, count - 1, 2):
            a, b = sources[j][low : low + size], sources[j + 1][low : low + size]
            ca, cb = weights[j], weights[j + 1]
            for i in range(size):
                z = get(origin, i)
                total[i] += fit(origin, get(a, i) - z) * ca + fit(origin, get(b, i) - z) * cb
        if count % 2:
            a, ca = sources[count - 1][low : low + size], weights[count - 1]
            for i in range(size):
                z = get(origin, i)
                total[i] += fit(origin, get(a, i) - z) * ca
        part = out[low : low + size]
        for i in range(size):
            worst = max(worst, put(part, origin, i, get(origin, i) + total[i]))
    return worst
