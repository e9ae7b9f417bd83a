"""The merge's inner loops on the CPU, compiled by numba; imported only where they are wanted.

bfloat16 is held as uint16: it is the upper half of a float32, so that reading is a shift and writing an
integer rounding to nearest even. Sources and outputs are uint16 (bfloat16) or float32 arrays; accumulators
are float32. Every loop returns the largest magnitude that it wrote as the bits of a float32, from which the
caller sees whether a value is not finite, at no cost.

Loops run over whole arrays from zero, since an index that might be negative keeps LLVM from vectorising.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, overload

# From this pattern on a float32's magnitude is infinite or NaN.
NOT_FINITE = 0x7F800000
# Elements of a block whose accumulators stay in the first-level cache.
BLOCK = 2048

_I32 = ir.IntType(32)


def jit(function: Any) -> Any:
    """Compile without the GIL, and keep the machine code on the disk where there is a place for it."""
    try:
        return numba.njit(nogil=True, cache=True)(function)
    except RuntimeError:  # neither the package's folder nor the user's cache can be written
        return numba.njit(nogil=True)(function)


@intrinsic
def wide(context: Any) -> Any:
    """Let LLVM use 512-bit vectors where the processor has them: half the instructions of its default."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        # llvmlite knows no such attribute; its set of attributes prints whatever it holds.
        set.add(builder.function.attributes, '"prefer-vector-width"="512"')
        return context.get_dummy_value()

    return types.none(), generate


def _rounded_bits(builder: Any, value: Any) -> Any:
    bits = builder.bitcast(value, _I32)
    odd = builder.and_(builder.lshr(bits, _I32(16)), _I32(1))
    return builder.add(builder.add(bits, _I32(0x7FFF)), odd)


@intrinsic
def widen(context: Any, bits: Any) -> Any:
    """The float32 of a bfloat16."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(builder.shl(builder.zext(args[0], _I32), _I32(16)), ir.FloatType())

    return types.float32(types.uint16), generate


@intrinsic
def nearest(context: Any, value: Any) -> Any:
    """A float32 rounded to bfloat16's precision, to nearest even."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        bits = builder.and_(_rounded_bits(builder, args[0]), _I32(0xFFFF0000))
        return builder.bitcast(bits, ir.FloatType())

    return types.float32(types.float32), generate


@intrinsic
def narrow(context: Any, value: Any) -> Any:
    """The bfloat16 nearest to a float32."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.trunc(builder.lshr(_rounded_bits(builder, args[0]), _I32(16)), ir.IntType(16))

    return types.uint16(types.float32), generate


@intrinsic
def magnitude(context: Any, value: Any) -> Any:
    """The bits of a float32's absolute value, which order as the values do."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.and_(builder.bitcast(args[0], _I32), _I32(0x7FFFFFFF))

    return types.uint32(types.float32), generate


def get(array, i):
    """An element as a float32."""
    raise NotImplementedError("`get` must be called in compiled code")


@overload(get, inline="always")
def _get(array, i):
    if array.dtype == types.uint16:
        return lambda array, i: widen(array[i])
    return lambda array, i: array[i]


def fit(like, value):
    """A float32 rounded to the precision of the array `like`."""
    raise NotImplementedError("`fit` must be called in compiled code")


@overload(fit, inline="always")
def _fit(like, value):
    if like.dtype == types.uint16:
        return lambda like, value: nearest(value)
    return lambda like, value: value


def put(out, like, i, value):
    """Write a value, rounded once to the coarser of both arrays; return its magnitude."""
    raise NotImplementedError("`put` must be called in compiled code")


@overload(put)
def _put(out, like, i, value):
    if out.dtype == types.uint16:

        def store(out, like, i, value):
            bits = narrow(value)
            out[i] = bits
            return magnitude(widen(bits))

        return store

    def keep(out, like, i, value):
        rounded = fit(like, value)
        out[i] = rounded
        return magnitude(rounded)

    return keep


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
