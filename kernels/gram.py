"""The op `gram_` in Triton: gram += sum_i w_i x_i x_i^T, float64 sums of near-float32 products.

Two launches at a time, for as many rows as `_PARTIAL` has room:

1. `_products`: a program takes a band of one square tile of the lower triangle and one slice of the
   rows, and writes their float32 sum.
2. `_add`: adds the slices' sums in float64 to the lower triangle and copies it to the upper one.

There are no atomics, so equal input gives equal bits on one kind of GPU.

Products. Float32 products must be put together from shorter tensor-core ones. Here each factor is
the sum of three bfloat16 parts of 8 bits, and six of the nine products matter: h h, h m, m h, m m,
h l, l h. Three products in TF32 (11 bits) take the same cycles, as their rate is half, but keep 22
bits instead of 24, need transposed stores on sm_90, whose TF32 instructions read shared memory in
one order only, and leave nothing to gain from 16-bit rows: bfloat16 is one part, so that three
products do, and float16 two, five. Compiled for sm_90, all are HGMMA, with x^T in registers and
w x in shared memory as it was loaded.

Sums. Tensor cores truncate where they add: a bias that grows with the rows. So each step of `DEPTH`
rows starts a sum from zero, small products first, which is then rounded to nearest as it is added.

Work: 6, 5 or 3 times `d (d + BLOCK) / 2 * n` multiply-adds. Bytes: x is read about
`d (1 / BLOCK + 1 / HEIGHT) / 2` times, from the L2 cache where its rows fit there. The sums between
the launches take at most `_PARTIAL` bytes, or a quarter of gram's where that is more.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from realera_fast.kernels.rounding import INTERPRETED


class Shape(NamedTuple):
    """How one kind of GPU runs `_products`."""

    block: int
    """Side of a tile."""
    height: int
    """Rows of a tile that a program takes."""
    depth: int
    """Rows of x of a step."""
    stages: int
    """Steps in flight, this one included."""
    warps: int
    resident: int
    """Programs that fit a multiprocessor together."""


# Two small programs instead of a large one: while one splits its numbers, the other multiplies.
_HOPPER = Shape(block=128, height=64, depth=32, stages=3, warps=4, resident=2)
# Each of the six products gets its own accumulator in tensor memory (by Triton 3.6): of tiles of
# 128 they would not fit, and the kernel would be compiled to nothing but a trap.
_BLACKWELL = Shape(block=64, height=64, depth=32, stages=3, warps=8, resident=1)
# Both factors are in registers here: a longer step would spill.
_OTHER = Shape(block=128, height=128, depth=16, stages=3, warps=8, resident=2)
# Numbers that are not aligned are copied one by one, and all their addresses would spill.
_BLACKWELL_UNALIGNED = _BLACKWELL._replace(depth=16, warps=4)
_UNALIGNED = {9: _OTHER, 10: _BLACKWELL_UNALIGNED, 11: _BLACKWELL_UNALIGNED}
_ALIGNED = {9: _HOPPER, 10: _BLACKWELL, 11: _BLACKWELL}
"""By major compute capability; `_OTHER` where none is given."""

_SLICE = 2048
"""Most rows whose products are summed in float32."""

_PARTIAL = 32 << 20
"""Bytes for the sums between the launches."""

_ADD_BLOCK = 32
"""Side of the square that a program of `_add` takes."""

_OPTIONS = {"enable_fp_fusion": True}
"""Launch options; fusing is stated because Triton's default for it is about to change."""

_PARTS = {torch.bfloat16: 1, torch.float16: 2, torch.float32: 3}
"""How many bfloat16 numbers it takes to hold one number of the rows."""


@triton.jit
def _tile_of(index, side):
    """Row and column of a tile of the lower triangle, `side` tiles high."""
    # Folded at its middle, a triangle is a rectangle.
    line = index // (side | 1)
    place = index % (side | 1)
    first = place < side - line
    i = tl.where(first, side - 1 - line, line - side % 2)
    j = tl.where(first, place, place - (side - line))
    return i, j


@triton.jit
def _bfloat16(x):
    # The interpreter multiplies bfloat16 by its bit patterns; the parts are exact in float32.
    return x if INTERPRETED else x.to(tl.bfloat16)


@triton.jit
def _split(x):
    """High, middle and low part of float32 numbers, each exact in bfloat16.

    By bits: conversions there and back are issued one by one, four times slower on sm_90. Only the
    high part is rounded to nearest, which is enough to make the products left out small and of
    either sign.
    """
    bits = x.to(tl.int32, bitcast=True)
    high = ((bits + 0x8000) & -0x10000).to(tl.float32, bitcast=True)
    rest = x - high
    middle = (rest.to(tl.int32, bitcast=True) & -0x10000).to(tl.float32, bitcast=True)
    return _bfloat16(high), _bfloat16(middle), _bfloat16(rest - middle)


# What changes from call to call must not cost a compilation.
@triton.jit(do_not_specialize=["first", "rows", "size", "side", "tiles"])
def _products(
    source_ptr,
    weight_ptr,
    partial_ptr,
    first,
    rows,
    size,
    width,
    side,
    tiles,
    stride_n,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    HEIGHT: tl.constexpr,
    DEPTH: tl.constexpr,
):
    BANDS: tl.constexpr = BLOCK // HEIGHT
    band = tl.program_id(0) % BANDS
    program = (tl.program_id(0) // BANDS).to(tl.int64)
    i, j = _tile_of((program % tiles).to(tl.int32), side)
    start = first + (program // tiles).to(tl.int32) * size
    end = tl.minimum(start + size, rows)
    place_i = band * HEIGHT + tl.arange(0, HEIGHT)
    column_i = i * BLOCK + place_i
    column_j = j * BLOCK + tl.arange(0, BLOCK)
    row = start + tl.arange(0, DEPTH).to(tl.int64)
    # Transposed by its addresses: a transposed view would be copied four bytes at a time.
    x_ptr = source_ptr + row[None, :] * stride_n + column_i[:, None]
    y_ptr = source_ptr + row[:, None] * stride_n + column_j[None, :]
    w_ptr = weight_ptr + row
    step = tl.cast(stride_n, tl.int64) * DEPTH
    total = tl.zeros([HEIGHT, BLOCK], tl.float32)
    for done in range(start, end, DEPTH):
        inside = done + tl.arange(0, DEPTH) < end
        x = tl.load(x_ptr, mask=inside[None, :] & (column_i < width)[:, None], other=0.0)
        y = tl.load(y_ptr, mask=inside[:, None] & (column_j < width)[None, :], other=0.0)
        w = tl.load(w_ptr, mask=inside, other=0.0)
        y_high, y_middle, y_low = _split(y.to(tl.float32) * w[:, None])
        x_high, x_middle, x_low = _split(x.to(tl.float32))
        product = tl.dot(x_high, y_low)
        if PARTS == 3:
            product = tl.dot(x_low, y_high, product)
        if PARTS > 1:
            product = tl.dot(x_middle, y_middle, product)
            product = tl.dot(x_middle, y_high, product)
        product = tl.dot(x_high, y_middle, product)
        total += tl.dot(x_high, y_high, product)
        x_ptr += step
        y_ptr += step
        w_ptr += DEPTH
    out_ptr = partial_ptr + program * (BLOCK * BLOCK)
    tl.store(out_ptr + place_i[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :], total)


@triton.jit(do_not_specialize=["splits", "side", "tiles"])
def _add(
    partial_ptr,
    gram_ptr,
    splits,
    width,
    side,
    tiles,
    BLOCK: tl.constexpr,
    PART: tl.constexpr,
):
    tile = tl.program_id(0)
    i, j = _tile_of(tile, side)
    place_i = tl.program_id(1) * PART + tl.arange(0, PART)
    place_j = tl.program_id(2) * PART + tl.arange(0, PART)
    place = tile.to(tl.int64) * (BLOCK * BLOCK) + place_i[:, None] * BLOCK + place_j[None, :]
    total = tl.zeros([PART, PART], tl.float64)
    for _ in range(splits):
        total += tl.load(partial_ptr + place).to(tl.float64)
        place += tiles.to(tl.int64) * (BLOCK * BLOCK)
    row = (i * BLOCK + place_i).to(tl.int64)[:, None]
    column = (j * BLOCK + place_j).to(tl.int64)[None, :]
    mask = (row < width) & (column <= row)
    total += tl.load(gram_ptr + row * width + column, mask=mask, other=0.0)
    tl.store(gram_ptr + row * width + column, total, mask=mask)
    tl.store(gram_ptr + column * width + row, total, mask=mask & (column < row))


def _shape(source: Tensor) -> Shape:
    if not source.is_cuda:
        return _OTHER
    # What Triton itself looks at, number by number.
    numbers = (source.data_ptr(), source.stride(0), source.shape[1])
    shapes = _UNALIGNED if any(number % 16 for number in numbers) else _ALIGNED
    return shapes.get(torch.cuda.get_device_capability(source.device)[0], _OTHER)


def _multiprocessors(device: torch.device) -> int:
    """Multiprocessors; one for the interpreter."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def _plan(rows: int, tiles: int, shape: Shape, multiprocessors: int) -> tuple[int, int]:
    """Number and size of the slices of a pair of launches.

    Args:
        rows: all rows.
        tiles: tiles of the triangle.
        shape: of `_products`.
        multiprocessors: of the GPU.
    """
    most = max(1, _PARTIAL // (4 * shape.block**2 * tiles))
    launches = triton.cdiv(rows, most * _SLICE)
    rows = triton.cdiv(rows, launches)
    together = multiprocessors * shape.resident
    programs = tiles * (shape.block // shape.height)
    fewest = triton.cdiv(rows, _SLICE)
    most = max(fewest, min(most, triton.cdiv(rows, shape.depth)))
    # The last wave of programs should be as full as the others.
    full = (together * waves // programs for waves in range(1, 9))
    candidates = [fewest, *(min(splits, most) for splits in full if splits > fewest)]
    splits = min(candidates, key=lambda splits: triton.cdiv(programs * splits, together) / splits)
    size = triton.cdiv(triton.cdiv(rows, splits), shape.depth) * shape.depth
    return triton.cdiv(rows, size), size


def gram_(gram: Tensor, source: Tensor, weight: Tensor) -> None:
    """Adds ``sum_i w_i x_i x_i^T`` to ``gram``: see :func:`realera_fast.ops.reference.gram_`.

    Args:
        gram: `[d, d]` float64, contiguous and symmetric: one triangle is summed and copied.
        source: `[n, d]` rows x, any strides: float32, bfloat16 or float16.
        weight: `[n]` weights w, of any floating dtype; used as float32.
    """
    rows, width = source.shape
    if rows == 0 or width == 0:
        return
    if source.stride(1) != 1:
        source = source.contiguous()
    weight = weight.to(torch.float32).contiguous()
    shape = _shape(source)
    side = triton.cdiv(width, shape.block)
    tiles = side * (side + 1) // 2
    splits, size = _plan(rows, tiles, shape, _multiprocessors(source.device))
    partial = source.new_empty((splits, tiles, shape.block, shape.block), dtype=torch.float32)
    part = min(_ADD_BLOCK, shape.block)
    with torch.cuda.device_of(source):
        for first in range(0, rows, splits * size):
            count = min(splits, triton.cdiv(rows - first, size))
            _products[(count * tiles * (shape.block // shape.height),)](
                source_ptr=source,
                weight_ptr=weight,
                partial_ptr=partial,
                first=first,
                rows=rows,
                size=size,
                width=width,
                side=side,
                tiles=tiles,
                stride_n=source.stride(0),
                PARTS=_PARTS[source.dtype],
                BLOCK=shape.block,
                HEIGHT=shape.height,
                DEPTH=shape.depth,
                num_warps=shape.warps,
                num_stages=shape.stages,
                **_OPTIONS,
            )
            _add[(tiles, shape.block // part, shape.block // part)](
                partial_ptr=partial,
                gram_ptr=gram,
                splits=count,
                width=width,
                side=side,
                tiles=tiles,
                BLOCK=shape.block,
                PART=part,
                num_warps=4,
                **_OPTIONS,
            )
