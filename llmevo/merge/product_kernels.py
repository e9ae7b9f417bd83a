"""Weighted sums of matrices and of products of thin factors on the CPU, compiled by numba.

A block of rows is multiplied in registers, a tile of 8 x 32 at a time, and stays in the cache until it is
rounded and written: the products are never in memory.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from llmevo.merge.cells import fit, get, jit, put, wide

ROWS = 8
_LANES = 16
_VECTORS = 2
COLUMNS = _LANES * _VECTORS

_I64 = ir.IntType(64)
_VECTOR = ir.VectorType(ir.FloatType(), _LANES)


@intrinsic
def tile(context, up, panel, total, place, stride, rank):
    """Write the product of `up` `[rank, ROWS]` and `panel` `[rank, COLUMNS]` into `total` from `place` on."""

    def generate(context, builder, signature, args):
        _, _, _, place, stride, rank = args
        left, right, out = (
            cgutils.create_struct_proxy(signature.args[i])(context, builder, value=args[i]).data
            for i in range(3)
        )
        sums = [
            [cgutils.alloca_once_value(builder, ir.Constant(_VECTOR, None)) for _ in range(_VECTORS)]
            for _ in range(ROWS)
        ]
        with cgutils.for_range(builder, rank) as loop:
            cells = builder.mul(loop.index, _I64(COLUMNS))
            row = [_vector(builder, right, cells, v) for v in range(_VECTORS)]
            for r in range(ROWS):
                index = builder.add(builder.mul(loop.index, _I64(ROWS)), _I64(r))
                factor = _splat(builder, builder.load(builder.gep(left, [index], inbounds=True)))
                for v in range(_VECTORS):
                    # `contract` fuses both where the processor can.
                    product = builder.fmul(factor, row[v], flags=("contract",))
                    old = builder.load(sums[r][v])
                    builder.store(builder.fadd(old, product, flags=("contract",)), sums[r][v])
        for r in range(ROWS):
            start = builder.add(place, builder.mul(stride, _I64(r)))
            for v in range(_VECTORS):
                store = builder.store(builder.load(sums[r][v]), _pointer(builder, out, start, v))
                store.align = 4
        return context.get_dummy_value()

    count = types.int64
    return types.none(up, panel, total, count, count, count), generate


def _pointer(builder: Any, data: Any, start: Any, vector: int) -> Any:
    index = builder.add(start, _I64(vector * _LANES))
    return builder.bitcast(builder.gep(data, [index], inbounds=True), _VECTOR.as_pointer())


def _vector(builder: Any, data: Any, start: Any, vector: int) -> Any:
    load = builder.load(_pointer(builder, data, start, vector))
    load.align = 4
    return load


def _splat(builder: Any, value: Any) -> Any:
    nothing = ir.Constant(_VECTOR, ir.Undefined)
    zeros = ir.Constant(ir.VectorType(ir.IntType(32), _LANES), [0] * _LANES)
    return builder.shuffle_vector(builder.insert_element(nothing, value, ir.IntType(32)(0)), nothing, zeros)


@jit
def panels(downs, columns):
    """Lay the rows of all `downs` `[rank, columns]` out as `[tiles, ranks, COLUMNS]`, padded with 0."""
    rank = 0
    for down in downs:
        rank += down.shape[0]
    tiles = -(-columns // COLUMNS)
    result = np.zeros((tiles, rank, COLUMNS), np.float32)
    k = 0
    for down in downs:
        for q in range(down.shape[0]):
            for t in range(tiles):
                size = min(COLUMNS, columns - t * COLUMNS)
                result[t, k, :size] = down[q, t * COLUMNS : t * COLUMNS + size]
            k += 1
    return result


@jit
def add(total, base, a, weight, shifts):
    """Add a weighted row, or its difference from the base's, rounded as the rows are."""
    wide()
    if shifts:
        for i in range(a.size):
            total[i] += fit(base, get(a, i) - get(base, i)) * weight
    else:
        for i in range(a.size):
            total[i] += get(a, i) * weight


@jit
def finish(out, base, total, shifts):
    """Write a row, with the base's added where differences were summed."""
    wide()
    worst = np.uint32(0)
    if shifts:
        for i in range(out.size):
            worst = max(worst, put(out, base, i, get(base, i) + total[i]))
    else:
        for i in range(out.size):
            worst = max(worst, put(out, base, i, total[i]))
    return worst


@jit
def product(out, base, sources, weights, shifts, ups, downs, scales, columns):
    """`out = sum(weights * sources) + sum(scales * ups @ downs)`, or of differences from a base, and it.

    Args:
        out: `[rows * columns]`.
        base: As `out`; without a base, whose precision the result is rounded to.
        sources: As `out`, each.
        weights: One float32 for each source.
        shifts: Whether there is a base.
        ups: `[rows, rank]`, float32, each.
        downs: `[rank, columns]`, float32, each.
        scales: One float32 for each product.
        columns: Of the matrices.
    """
    wide()
    right = panels(downs, columns)
    tiles, rank = right.shape[0], right.shape[1]
    width = tiles * COLUMNS
    left = np.zeros((rank, ROWS), np.float32)
    total = np.empty(ROWS * width, np.float32)
    worst = np.uint32(0)
    rows = out.size // columns
    for first in range(0, rows, ROWS):
        count = min(ROWS, rows - first)
        k = 0
        for j in range(len(ups)):
            for q in range(ups[j].shape[1]):
                for r in range(count):
                    left[k, r] = ups[j][first + r, q] * scales[j]
                k += 1
        for t in range(tiles):
            tile(left, right[t], total, t * COLUMNS, width, rank)
        for r in range(count):
            start = (first + r) * columns
            row = total[r * width : r * width + columns]
            origin = base[start : start + columns]
            for j in range(len(sources)):
                add(row, origin, sources[j][start : start + columns], weights[j], shifts)
            worst = max(worst, finish(out[start : start + columns], origin, row, shifts))
    return worst
