"""What the inner loops on the CPU are made of, compiled by numba; imported only where they are wanted.

bfloat16 is held as uint16: it is the upper half of a float32, so that reading is a shift and writing an
integer rounding to nearest even. float16 is held as int16, and the processor converts it. Sources and outputs
are uint16, int16 or float32 arrays; accumulators are float32. Every loop returns the largest magnitude that
it wrote as the bits of a float32, from which the caller sees whether a value is not finite, at no cost.

Loops run over whole arrays from zero, since an index that might be negative keeps LLVM from vectorising.
"""

from __future__ import annotations

import platform
from typing import Any

import numba
from llvmlite import binding, ir
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
def widen_half(context: Any, bits: Any) -> Any:
    """The float32 of a float16."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.fpext(builder.bitcast(args[0], ir.HalfType()), ir.FloatType())

    return types.float32(types.int16), generate


@intrinsic
def narrow_half(context: Any, value: Any) -> Any:
    """The float16 nearest to a float32."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(builder.fptrunc(args[0], ir.HalfType()), ir.IntType(16))

    return types.int16(types.float32), generate


def converts_halves() -> bool:
    """Whether the processor converts float16; LLVM would call a function that numba has not."""
    features = binding.get_host_cpu_features()
    return bool(features.get("f16c", True)) if features else platform.machine() in ("arm64", "aarch64")


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
    if array.dtype == types.int16:
        return lambda array, i: widen_half(array[i])
    return lambda array, i: array[i]


def fit(like, value):
    """A float32 rounded to the precision of the array `like`."""
    raise NotImplementedError("`fit` must be called in compiled code")


@overload(fit, inline="always")
def _fit(like, value):
    if like.dtype == types.uint16:
        return lambda like, value: nearest(value)
    if like.dtype == types.int16:
        return lambda like, value: widen_half(narrow_half(value))
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

    if out.dtype == types.int16:

        def store_half(out, like, i, value):
            bits = narrow_half(value)
            out[i] = bits
            return magnitude(widen_half(bits))

        return store_half

    def keep(out, like, i, value):
        rounded = fit(like, value)
        out[i] = rounded
        return magnitude(rounded)

    return keep


@intrinsic
def noise(context, counter, key, other):
    """32 random bits of a counter and two keys: two multiplications, shifts between them, no state.

    The multipliers and shifts are those of Chris Wellons's `lowbias32`; the keys go in before each of them.
    """

    def generate(context, builder, signature, args):
        counter, key, other = args
        bits = builder.xor(counter, key)
        bits = builder.xor(bits, builder.lshr(bits, _I32(16)))
        bits = builder.add(builder.mul(bits, _I32(0x7FEB352D)), other)
        bits = builder.xor(bits, builder.lshr(bits, _I32(15)))
        bits = builder.mul(bits, _I32(0x846CA68B))
        return builder.xor(bits, builder.lshr(bits, _I32(16)))

    return types.uint32(types.uint32, types.uint32, types.uint32), generate
