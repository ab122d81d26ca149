"""The ops `project_into` and `project_backward` in Triton: many linear layers with LoRA at once.

All l layers read the same rows x; layer l writes `heights[l]` columns of y:

    y_l = x W_l^T + scaling (x A_l^T) B_l^T

Layout, row-major:

    x        `[n, d]`      rows of all layers
    weight   `[m, d]`      the W_l one below the other; `heights[l]` rows are W_l
    down     `[l, r, d]`   the A_l, all of rank r
    up       `[m, r]`      the B_l one below the other, like the weights
    y        `[n, m]`      the y_l side by side; m is the sum of the heights

A tile of y lies within one layer, so that it needs one A_l; a table (`_tiles`) says which layer and
columns each tile has. The backward pass gives the gradients of `down` and `up` alone:

    dA_l = scaling (grad_l B_l)^T x,    dB_l = scaling grad_l^T (x A_l^T)

Forward, 16 bits: one program computes a tile of y that lies within one layer. Of many rows, the
hidden rows x A^T of all layers are a small library product before, and each program adds their
product with B to its own. Of few rows, where a launch costs more than arithmetic, the program
computes its hidden rows beside the base product: one launch for everything. A is then multiplied
again for every tile, which on sm_90 would cost an eighth of the base product: a product 16 columns
wide reads shared memory longer than it multiplies.

Forward, 32 and 64 bits: tensor cores do not serve, so the base is the library's product, and one
launch adds the LoRA parts of all layers: two numbers moved for each of y, beside 2 d operations.

Floor of the forward: 2 n m (d + r) operations and, in 16 bits, 2 (n d + m d + n m) bytes; a tile
reads `2 d (BLOCK_M + BLOCK_N)` of them from the L2 cache. From a few hundred rows on, operations
and that cache decide.

Backward: grad is read once (once for every 16 ranks). A program takes one layer and a slice of the
rows, block by block, and walks over the layer's columns: grad B stays in registers for a block of
rows; grad^T H is added up in memory that is the program's own, and the slices' sums are added
afterwards. No atomics, so equal input gives equal bits on one kind of GPU.

Floor of the backward: 2 n m bytes, one read of grad; its 4 n m r operations are free. Of many rows
the sums of the slices are `1 / _PARTIAL` of that at most, written and read once; adding to them for
every block of rows stays in the L2 cache.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from realera_fast.kernels.rounding import INTERPRETED, rounded


class Shape(NamedTuple):
    """How `_project` runs, or `_backward` (which has no `k`)."""

    m: int
    """Rows of a tile."""
    n: int
    """Columns of a tile."""
    k: int
    """Columns of x and of the weights of a step."""
    warps: int
    stages: int
    """Steps in flight, this one included."""


class Shapes(NamedTuple):
    """What one kind of GPU runs, by the number of rows."""

    small: Shape
    """Memory decides: all of the weights are read for up to `_SMALL_ROWS` rows."""
    medium: Shape
    large: Shape
    """High rather than wide: heights are multiples of 128 sooner than of 256 (320 never is)."""


_HOPPER = Shapes(
    small=Shape(m=64, n=128, k=64, warps=4, stages=4),
    medium=Shape(m=128, n=128, k=64, warps=8, stages=3),
    large=Shape(m=256, n=128, k=64, warps=8, stages=4),
)
_OTHER = Shapes(
    small=Shape(m=64, n=64, k=64, warps=4, stages=4),
    medium=Shape(m=128, n=128, k=32, warps=8, stages=4),
    large=Shape(m=128, n=128, k=32, warps=8, stages=4),
)
_SHAPES = {9: _HOPPER, 10: _HOPPER, 11: _HOPPER}
"""By major compute capability; `_OTHER` where none is given."""
_UNALIGNED = Shape(m=64, n=64, k=32, warps=4, stages=2)
"""Numbers that are not aligned are copied one by one, and all their addresses would spill."""

_SMALL_ROWS = 64
_MEDIUM_ROWS = 1024
_FUSED_ROWS = 512
"""Most rows whose hidden rows are computed again for every tile."""
_RANK = 16
"""Ranks multiplied at once: the fewest that tensor cores take. More go on in further steps."""

_GROUP = 8
"""Blocks of rows that share the tiles of the weights in the L2 cache."""

_ADD = Shape(m=32, n=128, k=1, warps=4, stages=1)

_BACKWARD = Shape(m=128, n=64, k=1, warps=4, stages=4)
_BACKWARD_FEW = _BACKWARD._replace(m=64)
_BACKWARD_UNALIGNED = Shape(m=64, n=32, k=1, warps=4, stages=2)
_BACKWARD_FLOAT32 = Shape(m=64, n=16, k=1, warps=4, stages=2)
"""No tensor cores: both factors are in registers."""

_BACKWARD_PROGRAMS = 512
"""Programs that `_BACKWARD` must give; `_BACKWARD_FEW` gives more."""
_PARTIAL = 16
"""How many times smaller than grad the memory for the sums of the slices is to be."""
_FEWEST_SLICES = 16

_OPTIONS = {"enable_fp_fusion": True}
"""Launch options; fusing is stated because Triton's default for it is about to change."""


@triton.jit
def _operand(x):
    # The interpreter multiplies bfloat16 by its bit patterns; the products are exact in float32.
    return x.to(tl.float32) if INTERPRETED else x


@triton.jit
def _tile(tiles_ptr, index, ALIGN: tl.constexpr):
    """Layer, first column and end of a tile or a layer."""
    layer = tl.load(tiles_ptr + 4 * index)
    start = tl.load(tiles_ptr + 4 * index + 1)
    end = tl.load(tiles_ptr + 4 * index + 2)
    # What comes from memory would be stored number by number without a promise.
    return layer, tl.multiple_of(start, ALIGN), tl.multiple_of(end, ALIGN)


# What changes from call to call must not cost a compilation.
@triton.jit(do_not_specialize=["rows", "tiles"])
def _project(
    y_ptr,
    x_ptr,
    weight_ptr,
    thin_ptr,
    up_ptr,
    tiles_ptr,
    scaling: tl.float32,
    rows,
    width,
    rank,
    tiles,
    stride_y,
    stride_x,
    stride_w,
    stride_h,
    FUSED: tl.constexpr,
    EVEN: tl.constexpr,
    ALIGN: tl.constexpr,
    LOOP: tl.constexpr,
    RANK: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A tile of y.

    `thin_ptr`: A of all layers if FUSED, else the scaled hidden rows of all layers. Scaled before
    they are rounded, as a product to scale would need as many registers as the tile itself.
    LOOP: more ranks than RANK. A loop of one step costs registers that large tiles do not have.
    """
    program = tl.program_id(0)
    group = program // (GROUP * tiles)
    inside = program % (GROUP * tiles)
    count = tl.minimum(tl.cdiv(rows, BLOCK_M) - group * GROUP, GROUP)
    block = group * GROUP + inside % count
    layer, start, end = _tile(tiles_ptr, inside // count, ALIGN)

    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    column = start + tl.arange(0, BLOCK_N)
    # Beyond the end the last row is read again, and not stored: cheaper than masks in the loop.
    near_row = tl.minimum(row, rows - 1).to(tl.int64)
    near_column = tl.minimum(column, end - 1).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    rank_place = tl.arange(0, RANK)
    x_place = x_ptr + near_row[:, None] * stride_x + k[None, :]
    w_place = weight_ptr + near_column[None, :] * stride_w + k[:, None]
    up_place = up_ptr + near_column[None, :] * rank + rank_place[:, None]

    if FUSED:
        thin_row = layer.to(tl.int64) * rank + rank_place
        thin_place = thin_ptr + thin_row[None, :] * width + k[:, None]
    else:
        thin_place = thin_ptr + near_row[:, None] * stride_h + layer * rank + rank_place[None, :]
    used = rank_place < rank
    if not LOOP:
        # Long before they are needed.
        b = tl.load(up_place, mask=used[:, None], other=0.0)
        if not FUSED:
            h = tl.load(thin_place, mask=used[None, :], other=0.0)

    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    hidden = tl.zeros([BLOCK_M, RANK], tl.float32)
    for done in range(0, width, BLOCK_K):
        if EVEN:
            x = tl.load(x_place)
            w = tl.load(w_place)
        else:
            valid = done + k < width
            x = tl.load(x_place, mask=valid[None, :], other=0.0)
            w = tl.load(w_place, mask=valid[:, None], other=0.0)
        total = tl.dot(_operand(x), _operand(w), total, input_precision="ieee")
        if FUSED:
            if EVEN:
                a = tl.load(thin_place, mask=used[None, :], other=0.0)
            else:
                a = tl.load(thin_place, mask=used[None, :] & valid[:, None], other=0.0)
            hidden = tl.dot(_operand(x), _operand(a), hidden, input_precision="ieee")
            thin_place += BLOCK_K
        x_place += BLOCK_K
        w_place += BLOCK_K

    if FUSED:
        h = rounded(scaling * hidden, x_ptr.dtype.element_ty)
    if LOOP:
        for chunk in tl.range(0, rank, RANK, num_stages=1):
            used = chunk + rank_place < rank
            h = tl.load(thin_place + chunk, mask=used[None, :], other=0.0)
            b = tl.load(up_place + chunk, mask=used[:, None], other=0.0)
            total = tl.dot(_operand(h), _operand(b), total, input_precision="ieee")
    else:
        total = tl.dot(_operand(h), _operand(b), total, input_precision="ieee")
    out = y_ptr + row.to(tl.int64)[:, None] * stride_y + column[None, :]
    mask = (row < rows)[:, None] & (column < end)[None, :]
    tl.store(out, rounded(total, y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "tiles"])
def _add(
    y_ptr,
    hidden_ptr,
    up_ptr,
    tiles_ptr,
    rows,
    rank,
    tiles,
    stride_y,
    stride_h,
    ALIGN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Adds the LoRA part to a tile of y, in float32 or float64; hidden rows are scaled."""
    program = tl.program_id(0)
    layer, start, end = _tile(tiles_ptr, program % tiles, ALIGN)
    row = (program // tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = start + tl.arange(0, BLOCK_N)
    near_row = tl.minimum(row, rows - 1).to(tl.int64)
    near_column = tl.minimum(column, end - 1).to(tl.int64)
    h_place = hidden_ptr + near_row * stride_h + layer * rank
    b_place = up_ptr + near_column * rank
    total = tl.zeros([BLOCK_M, BLOCK_N], y_ptr.dtype.element_ty)
    for _ in range(rank):
        total += tl.load(h_place)[:, None] * tl.load(b_place)[None, :]
        h_place += 1
        b_place += 1
    out = y_ptr + row.to(tl.int64)[:, None] * stride_y + column[None, :]
    mask = (row < rows)[:, None] & (column < end)[None, :]
    y = tl.load(out, mask=mask, other=0.0)
    tl.store(out, y + total, mask=mask)


@triton.jit(do_not_specialize=["rows", "size", "slices"])
def _backward(
    grad_ptr,
    hidden_ptr,
    up_ptr,
    grad_hidden_ptr,
    partial_ptr,
    layers_ptr,
    scaling: tl.float32,
    rows,
    outputs,
    rank,
    size,
    slices,
    stride_g,
    stride_h,
    ALIGN: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A slice of the rows of one layer. `up_ptr`: transposed, so that columns come in one piece."""
    program = tl.program_id(0)
    part = program % slices
    layer, start, end = _tile(layers_ptr, program // slices, ALIGN)
    place = tl.program_id(1) * RANK + tl.arange(0, RANK)
    used = place < rank
    up_row = up_ptr + place.to(tl.int64)[:, None] * outputs
    # Its own memory, never another program's: added to without atomics.
    sum_row = partial_ptr + part.to(tl.int64) * outputs * rank
    first = part * size
    for top in range(first, tl.minimum(first + size, rows), BLOCK_M):
        row = top + tl.arange(0, BLOCK_M)
        inside = (row < rows)[:, None]
        thin = row.to(tl.int64)[:, None] * stride_h + (layer * rank + place)[None, :]
        hidden = tl.load(hidden_ptr + thin, mask=inside & used[None, :], other=0.0)
        hidden = tl.trans(_operand(hidden))
        grad_row = grad_ptr + row.to(tl.int64)[:, None] * stride_g
        later = tl.full([BLOCK_N], top, tl.int32) > first
        total = tl.zeros([BLOCK_M, RANK], tl.float32)
        for left in range(start, end, BLOCK_N):
            column = tl.multiple_of(left, ALIGN) + tl.arange(0, BLOCK_N)
            valid = column < end
            g = tl.load(grad_row + column[None, :], mask=inside & valid[None, :], other=0.0)
            b = tl.load(up_row + column[None, :], mask=used[:, None] & valid[None, :], other=0.0)
            out = sum_row + column.to(tl.int64)[:, None] * rank + place[None, :]
            mask = valid[:, None] & used[None, :]
            before = tl.load(out, mask=mask & later[:, None], other=0.0)
            g = _operand(g)
            total = tl.dot(g, tl.trans(_operand(b)), total, input_precision="ieee")
            # H^T g rather than g^T H: grad is wanted in one order alone then, so that sm_80
            # copies it asynchronously, too.
            product = tl.trans(tl.dot(hidden, g, input_precision="ieee"))
            tl.store(out, before + scaling * product, mask=mask)
        total = rounded(total, grad_hidden_ptr.dtype.element_ty)
        tl.store(grad_hidden_ptr + thin, total, mask=inside & used[None, :])


def _aligned(heights: tuple[int, ...], *matrices: Tensor) -> bool:
    """Whether layers and rows start where 16 bytes can be copied at once."""
    # What Triton itself looks at, number by number.
    numbers = (number for t in matrices for number in (t.data_ptr(), t.stride(0), t.shape[1]))
    return _alignment(heights) == 16 and not any(number % 16 for number in numbers)


def _shape(heights: tuple[int, ...], y: Tensor, x: Tensor, weight: Tensor, rank: int) -> Shape:
    """Of `_project`."""
    if not x.is_cuda or not _aligned(heights, y, x, weight):
        return _UNALIGNED
    shapes = _SHAPES.get(torch.cuda.get_device_capability(x.device)[0], _OTHER)
    if len(x) <= _SMALL_ROWS:
        return shapes.small
    return shapes.medium if len(x) <= _MEDIUM_ROWS or rank > _RANK else shapes.large


def _backward_shape(heights: tuple[int, ...], grad: Tensor) -> Shape:
    """Of `_backward`."""
    if grad.dtype == torch.float32:
        return _BACKWARD_FLOAT32
    if not _aligned(heights, grad):
        return _BACKWARD_UNALIGNED
    blocks = triton.cdiv(len(grad), _BACKWARD.m)
    return _BACKWARD if blocks * len(heights) >= _BACKWARD_PROGRAMS else _BACKWARD_FEW


def _slices(rows: int, rank: int, block: int, item_size: int) -> tuple[int, int]:
    """Number and size of the slices of the rows in the backward pass.

    Args:
        rows: all rows.
        rank: LoRA rank.
        block: rows of a block, which divides the size.
        item_size: bytes of a number of grad.
    """
    blocks = triton.cdiv(rows, block)
    most = max(_FEWEST_SLICES, rows * item_size // (4 * rank * _PARTIAL))
    size = triton.cdiv(blocks, min(blocks, most)) * block
    return triton.cdiv(rows, size), size


def _listed(tiles: Sequence[tuple[int, int, int]], device: torch.device) -> Tensor:
    return torch.tensor([(*tile, 0) for tile in tiles], dtype=torch.int32, device=device)


# Nothing may leave these caches: a captured CUDA graph goes on reading the memory.
@functools.cache
def _tiles(heights: tuple[int, ...], block: int, device: torch.device) -> Tensor:
    """`[tiles, 4]` int32: layer, first column, end of every tile of `block` columns, and 0."""
    tiles = []
    start = 0
    for layer, height in enumerate(heights):
        end = start + height
        tiles += [(layer, left, min(left + block, end)) for left in range(start, end, block)]
        start = end
    return _listed(tiles, device)


@functools.cache
def _layers(heights: tuple[int, ...], device: torch.device) -> Tensor:
    """`[layers, 4]` int32: layer, first column, end and 0; those that take longest come first."""
    layers = []
    start = 0
    for layer, height in enumerate(heights):
        if height:
            layers.append((layer, start, start + height))
        start += height
    return _listed(sorted(layers, key=lambda item: item[1] - item[2]), device)


def _alignment(heights: tuple[int, ...]) -> int:
    """What divides the first column and the end of every layer: 16, or 1."""
    return 1 if any(height % 16 for height in heights) else 16


def _rows_of(matrix: Tensor) -> Tensor:
    """A matrix whose rows are contiguous each."""
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def project_into(
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    down: Tensor | None,
    up: Tensor | None,
    heights: Sequence[int],
    scaling: float,
) -> None:
    """Writes `realera_fast.ops.reference.project` into `y`.

    It can be captured in a CUDA graph once it has run for these heights: the list of tiles is
    copied to the GPU then.

    Args:
        y: `[n, m]` of the dtype of ``x``, any strides.
        x: `[n, d]` rows, any strides: bfloat16, float16, float32 or float64.
        weight: `[m, d]`, of the same dtype, any strides.
        down: `[l, r, d]` LoRA factors A_l, or None; rounded to the dtype of ``x``.
        up: `[m, r]` LoRA factors B_l one below the other, likewise, or None.
        heights: the number of rows of each of the l weights.
        scaling: factor of the LoRA part.
    """
    if y.numel() == 0:
        return
    if down is None or up is None or down.shape[1] == 0:
        torch.mm(x, weight.mT, out=y)
        return
    if y.stride(1) != 1:
        y.copy_(project(x, weight, down, up, heights, scaling))
        return
    heights = tuple(heights)
    rows, width = x.shape
    rank = down.shape[1]
    x, weight = _rows_of(x), _rows_of(weight)
    thin = down.to(x.dtype).flatten(0, 1).contiguous()
    up = up.to(x.dtype).contiguous()
    wide = x.element_size() > 2
    shape = _ADD if wide else _shape(heights, y, x, weight, rank)
    fused = not wide and rows <= _FUSED_ROWS and rank <= _RANK
    tiles = _tiles(heights, shape.n, x.device)
    grid = (len(tiles) * triton.cdiv(rows, shape.m),)
    common = {
        "y_ptr": y,
        "up_ptr": up,
        "tiles_ptr": tiles,
        "rows": rows,
        "rank": rank,
        "tiles": len(tiles),
        "stride_y": y.stride(0),
        "stride_h": len(thin),
        "ALIGN": _alignment(heights),
        "BLOCK_M": shape.m,
        "BLOCK_N": shape.n,
        "num_warps": shape.warps,
        "num_stages": shape.stages,
        **_OPTIONS,
    }
    if not fused:
        hidden = x.new_empty((rows, len(thin)))
        thin = hidden.addmm_(x, thin.mT, beta=0, alpha=scaling)
    with torch.cuda.device_of(x):
        if wide:
            torch.mm(x, weight.mT, out=y)
            _add[grid](hidden_ptr=thin, **common)
            return
        _project[grid](
            x_ptr=x,
            weight_ptr=weight,
            thin_ptr=thin,
            scaling=scaling,
            width=width,
            stride_x=x.stride(0),
            stride_w=weight.stride(0),
            FUSED=fused,
            EVEN=width % shape.k == 0,
            LOOP=rank > _RANK,
            RANK=_RANK,
            GROUP=_GROUP,
            BLOCK_K=shape.k,
            **common,
        )


def project(
    x: Tensor,
    weight: Tensor,
    down: Tensor | None,
    up: Tensor | None,
    heights: Sequence[int],
    scaling: float,
) -> Tensor:
    """`realera_fast.ops.reference.project`, see :func:`project_into`.

    Returns:
        `[n, m]`, of the dtype of ``x``.
    """
    y = x.new_empty((len(x), len(weight)))
    project_into(y, x, weight, down, up, heights, scaling)
    return y


def _product(left: Tensor, right: Tensor) -> Tensor:
    """A product of matrices that is not rounded to 16 bits: in float32, or in float64."""
    if left.element_size() > 2:
        return torch.mm(left, right)
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=torch.float32)
    return torch.mm(left.float(), right.float())


def _double_backward(
    grad: Tensor, hidden: Tensor, up: Tensor, heights: tuple[int, ...], scaling: float
) -> tuple[Tensor, Tensor]:
    """Gradients for the hidden rows (not scaled) and for ``up``, of library calls."""
    rank = up.shape[1]
    grad_hidden, grad_up = torch.empty_like(hidden), torch.empty_like(up)
    start = 0
    for layer, height in enumerate(heights):
        part, ranks = slice(start, start + height), slice(layer * rank, (layer + 1) * rank)
        grad_hidden[:, ranks] = grad[:, part] @ up[part]
        grad_up[part] = grad[:, part].mT @ hidden[:, ranks]
        start += height
    return grad_hidden, grad_up.mul_(scaling)


def project_backward(
    grad: Tensor, x: Tensor, down: Tensor, up: Tensor, heights: Sequence[int], scaling: float
) -> tuple[Tensor, Tensor]:
    """`realera_fast.ops.reference.project_backward`; captured in CUDA graphs like `project_into`.

    Args:
        grad: `[n, m]` gradient of the result, of the dtype of ``x``, any strides.
        x: `[n, d]` rows, any strides: bfloat16, float16, float32 or float64.
        down: `[l, r, d]` LoRA factors A_l; rounded to the dtype of ``x``.
        up: `[m, r]` LoRA factors B_l one below the other, likewise.
        heights: the number of rows of each of the l weights.
        scaling: factor of the LoRA part.

    Returns:
        `[l, r, d]` and `[m, r]` gradients of ``down`` and ``up``, float32 (float64 for float64
        ``x``), not rounded in between to 16 bits except for ``grad B_l``, as by the reference.
    """
    heights = tuple(heights)
    rows = len(x)
    outputs, rank = up.shape
    exact = torch.float64 if x.dtype == torch.float64 else torch.float32
    if rows == 0 or outputs == 0 or down.numel() == 0:
        return x.new_zeros(down.shape, dtype=exact), x.new_zeros(up.shape, dtype=exact)
    hidden = torch.mm(x, down.to(x.dtype).flatten(0, 1).mT)
    if x.dtype == torch.float64:
        grad_hidden, grad_up = _double_backward(grad, hidden, up.to(exact), heights, scaling)
        return _product(grad_hidden.mT, x).mul_(scaling).view(down.shape), grad_up

    grad = _rows_of(grad)
    # Converted and transposed at once.
    up = x.new_empty((rank, outputs)).copy_(up.mT)
    layers = _layers(heights, x.device)
    shape = _backward_shape(heights, grad)
    slices, size = _slices(rows, rank, shape.m, x.element_size())
    # The hidden rows of layers that are empty are not written.
    grad_hidden = torch.empty_like(hidden) if all(heights) else torch.zeros_like(hidden)
    partial = x.new_empty((slices, outputs, rank), dtype=exact)
    with torch.cuda.device_of(x):
        _backward[(len(layers) * slices, triton.cdiv(rank, _RANK))](
            grad_ptr=grad,
            hidden_ptr=hidden,
            up_ptr=up,
            grad_hidden_ptr=grad_hidden,
            partial_ptr=partial,
            layers_ptr=layers,
            scaling=scaling,
            rows=rows,
            outputs=outputs,
            rank=rank,
            size=size,
            slices=slices,
            stride_g=grad.stride(0),
            stride_h=hidden.stride(0),
            ALIGN=_alignment(heights),
            RANK=_RANK,
            BLOCK_M=shape.m,
            BLOCK_N=shape.n,
            num_warps=shape.warps,
            num_stages=shape.stages,
            **_OPTIONS,
        )
    grad_down = _product(grad_hidden.mT, x).mul_(scaling).view(down.shape)
    return grad_down, partial[0] if slices == 1 else partial.sum(0)
