"""The op `perturb` in Triton: random points around prompt embeddings (`realera_fast.philox`).

x = alpha E + beta v per concept and sample, v = rms(E) z, where beta is uniform over its accepted
interval. That interval needs E.z and |z|^2 over the whole prompt, so there are two launches, and
the noise z is drawn twice from its counters rather than stored:

1. `_sums`: every program draws one tile of z and writes the tile's |E|^2, E.z, |z|^2.
2. `_rows`: every program adds the partial sums of its sample, solves for the interval, draws its
   tile of z again and writes its rows.

Bytes moved: E is read twice per sample (from L2 when E fits there), rows are written once; the
partial sums are 12 bytes per `4 * BLOCK` elements. Tiles depend on `[t, d]` alone and their sums
are added in one order, without atomics: a sample's bits do not depend on batch or offset.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from realera_fast.philox import GUARD, check_perturb, sine

_BLOCK = 512
"""Groups of four columns per program, four per thread; fewer for a prompt smaller than that."""

_OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}
"""Launch options; fusing is stated because Triton's default for it is about to change."""


@triton.jit
def _normal_pair(u1, u2):
    """Box-Muller, as `tl.pair_uniform_to_normal`, with one sine and cosine for angles in [0, 2 pi].

    The general `tl.cos` and `tl.sin` each carry a slow path for huge angles, which cost registers
    (and spills). Here: reduction by multiples of pi / 2 in three parts, then Cephes' `sinf`,
    `cosf`.
    """
    radius = tl.sqrt(-2.0 * tl.log(tl.maximum(u1, 1.0e-7)))
    angle = 6.283185307179586 * u2
    turns = tl.floor(angle * 0.6366197723675814 + 0.5)
    x = tl.fma(turns, -1.5707960128784180, angle)
    x = tl.fma(turns, -3.1391647326017846e-07, x)
    x = tl.fma(turns, -5.3903025299577648e-15, x)
    y = x * x
    s = tl.fma(y, -1.9515295891e-4, 8.3321608736e-3)
    s = tl.fma(s, y, -1.6666654611e-1)
    s = tl.fma(s * y, x, x)
    c = tl.fma(y, 2.443315711809948e-5, -1.388731625493765e-3)
    c = tl.fma(c, y, 4.166664568298827e-2)
    c = tl.fma(c * y, y, tl.fma(y, -0.5, 1.0))
    quadrant = turns.to(tl.int32)
    odd = (quadrant & 1) == 1
    cosine = tl.where(odd, s, c)
    sin_ = tl.where(odd, c, s)
    cosine = tl.where(((quadrant + 1) & 2) == 2, -cosine, cosine)
    sin_ = tl.where((quadrant & 2) == 2, -sin_, sin_)
    return radius * cosine, radius * sin_


@triton.jit
def _tile_noise(seed, first, sample, concept, groups, BLOCK: tl.constexpr):
    """Normals of `BLOCK` column groups from flat group `first` on, `[4 * BLOCK]`."""
    i = first + tl.arange(0, BLOCK)
    token = (1 + i // groups).to(tl.uint32)
    group = (i % groups).to(tl.uint32)
    # Full blocks for every word: the rounds mix words, so all must have one shape and type.
    w0, w1, w2, w3 = tl.philox(
        seed,
        group,
        token,
        tl.full([BLOCK], 0, tl.uint32) + sample,
        tl.full([BLOCK], 0, tl.uint32) + concept,
    )
    u0 = tl.uint_to_uniform_float(w0)
    u1 = tl.uint_to_uniform_float(w1)
    u2 = tl.uint_to_uniform_float(w2)
    u3 = tl.uint_to_uniform_float(w3)
    n0, n1 = _normal_pair(u0, u1)
    n2, n3 = _normal_pair(u2, u3)
    return tl.interleave(tl.interleave(n0, n2), tl.interleave(n1, n3))


@triton.jit
def _tile_places(first, tokens, width, groups, BLOCK: tl.constexpr):
    """Token, column and mask of the `4 * BLOCK` elements of a tile, in the order of its noise."""
    i = 4 * first + tl.arange(0, 4 * BLOCK)
    token = 1 + i // (4 * groups)
    column = i % (4 * groups)
    return token, column, (token < tokens) & (column < width)


@triton.jit(do_not_specialize=["seed", "offset"])
def _sums(
    e_ptr,
    partial_ptr,
    seed: tl.int64,
    offset: tl.int64,
    samples,
    tokens,
    width,
    stride_c,
    stride_t,
    stride_d,
    groups,
    tiles,
    DOUBLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    pair = program // tiles
    first = ((program % tiles) * BLOCK).to(tl.int32)
    concept = pair // samples
    sample = (offset + pair % samples).to(tl.uint32)
    token, column, mask = _tile_places(first, tokens, width, groups, BLOCK)
    place = concept * stride_c + token.to(tl.int64) * stride_t + column.to(tl.int64) * stride_d
    e = tl.load(e_ptr + place, mask=mask, other=0.0)
    z = _tile_noise(seed, first, sample, concept.to(tl.uint32), groups, BLOCK)
    if DOUBLE:
        e = e.to(tl.float64)
        z = z.to(tl.float64)
    else:
        e = e.to(tl.float32)
    z = tl.where(mask, z, 0.0)
    tl.store(partial_ptr + 3 * program, tl.sum(e * e, 0))
    tl.store(partial_ptr + 3 * program + 1, tl.sum(e * z, 0))
    tl.store(partial_ptr + 3 * program + 2, tl.sum(z * z, 0))


@triton.jit(do_not_specialize=["seed", "offset"])
def _rows(
    e_ptr,
    partial_ptr,
    rows_ptr,
    alpha_ptr,
    beta_ptr,
    seed: tl.int64,
    offset: tl.int64,
    samples,
    tokens,
    width,
    stride_c,
    stride_t,
    stride_d,
    groups,
    tiles,
    min_cosine: tl.float64,
    min_sine: tl.float64,
    max_cosine: tl.float64,
    max_sine: tl.float64,
    max_distance: tl.float64,
    guard: tl.float64,
    DOUBLE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    TILES: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    pair = program // tiles
    tile = program % tiles
    first = (tile * BLOCK).to(tl.int32)
    concept = pair // samples
    sample = (offset + pair % samples).to(tl.uint32)

    # The scalars are a handful of operations per program: float64 costs nothing and keeps the
    # sample inside its region however close to the border the uniform falls.
    i_tile = tl.arange(0, TILES)
    partial = partial_ptr + 3 * (pair * tiles + i_tile)
    square = tl.sum(tl.load(partial, mask=i_tile < tiles, other=0.0).to(tl.float64), 0)
    inner = tl.sum(tl.load(partial + 1, mask=i_tile < tiles, other=0.0).to(tl.float64), 0)
    total = tl.sum(tl.load(partial + 2, mask=i_tile < tiles, other=0.0).to(tl.float64), 0)
    elements = ((tokens - 1).to(tl.int64) * width).to(tl.float64)
    parallel = inner / tl.sqrt(square * elements)
    perpendicular = tl.sqrt(tl.maximum(total / elements - parallel * parallel, 0.0))
    away = 1.0 - parallel
    distance = tl.sqrt(perpendicular * perpendicular + away * away)
    low_denominator = perpendicular * max_cosine + away * max_sine
    low = tl.where(low_denominator > 0, max_sine / low_denominator, float("inf"))
    low = tl.where(max_cosine >= 1.0, 0.0, low) * (1.0 + guard)
    high_denominator = perpendicular * min_cosine + away * min_sine
    high = tl.where(high_denominator > 0, min_sine / high_denominator, float("inf"))
    high = tl.minimum(max_distance / distance, high) * (1.0 - guard)
    zero = tl.full([4], 0, tl.uint32)
    word, _, _, _ = tl.philox(seed, zero, zero, zero + sample, zero + concept.to(tl.uint32))
    # All four lanes hold the same uniform; their maximum is the scalar.
    uniform = tl.max(tl.uint_to_uniform_float(word), 0).to(tl.float64)
    beta = low + uniform * (high - low)
    # Written so that NaN sums (a zero or non-finite E) fall on the NaN side too.
    beta = tl.where(low <= high, beta, float("nan"))
    alpha = 1.0 - beta
    alpha = alpha.to(alpha_ptr.dtype.element_ty)
    beta = beta.to(beta_ptr.dtype.element_ty)
    scale = beta.to(tl.float64) * tl.sqrt(square / elements)

    out_ptr = rows_ptr + pair * tokens * width
    if tile == 0:
        tl.store(alpha_ptr + pair, alpha)
        tl.store(beta_ptr + pair, beta)
        column = tl.arange(0, BLOCK_WIDTH)
        start_ptr = e_ptr + concept * stride_c + column.to(tl.int64) * stride_d
        start = tl.load(start_ptr, mask=column < width, other=0.0)
        tl.store(out_ptr + column, start, mask=column < width)

    token, column, mask = _tile_places(first, tokens, width, groups, BLOCK)
    place = concept * stride_c + token.to(tl.int64) * stride_t + column.to(tl.int64) * stride_d
    e = tl.load(e_ptr + place, mask=mask, other=0.0)
    z = _tile_noise(seed, first, sample, concept.to(tl.uint32), groups, BLOCK)
    if DOUBLE:
        x = alpha * e + scale * z.to(tl.float64)
    else:
        x = alpha * e.to(tl.float32) + scale.to(tl.float32) * z
    tl.store(out_ptr + token.to(tl.int64) * width + column, x, mask=mask)


def perturb(
    embeddings: Tensor,
    samples: int,
    min_cosine: float,
    max_cosine: float,
    max_distance: float,
    seed: int,
    offset: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """`realera_fast.philox.perturb` by two launches.

    Args:
        embeddings: `[c, t, d]` prompt embeddings, any strides; row 0 is begin-of-text.
        samples: s, samples per concept.
        min_cosine, max_cosine: window of the cosine between the embedding and a sample.
        max_distance: longest step in units of the embedding's norm.
        seed: key of the random stream.
        offset: counter of the first sample.

    Returns:
        rows `[c, s, t, d]` of the embeddings' type; alpha, beta `[c, s]`, float64 for float64
        embeddings, else float32; NaN where no point is accepted. Float32 arithmetic, float64 for
        float64 embeddings; the scalars in float64 always.
    """
    check_perturb(embeddings, samples, min_cosine, max_cosine, max_distance, seed, offset)
    concepts, tokens, width = embeddings.shape
    double = embeddings.dtype == torch.float64
    exact = torch.float64 if double else torch.float32
    rows = embeddings.new_empty((concepts, samples, tokens, width))
    pairs = concepts * samples
    if rows.numel() == 0 or tokens == 1:
        rows.copy_(embeddings[:, None])
        alpha = embeddings.new_ones((concepts, samples), dtype=exact)
        return rows, alpha, torch.zeros_like(alpha)
    alpha = embeddings.new_empty((concepts, samples), dtype=exact)
    beta = torch.empty_like(alpha)
    groups = triton.cdiv(width, 4)
    block = min(_BLOCK, triton.next_power_of_2((tokens - 1) * groups))
    tiles = triton.cdiv((tokens - 1) * groups, block)
    partial = embeddings.new_empty((pairs, tiles, 3), dtype=exact)
    with torch.cuda.device_of(embeddings):
        _sums[(pairs * tiles,)](
            e_ptr=embeddings,
            partial_ptr=partial,
            seed=seed,
            offset=offset,
            samples=samples,
            tokens=tokens,
            width=width,
            stride_c=embeddings.stride(0),
            stride_t=embeddings.stride(1),
            stride_d=embeddings.stride(2),
            groups=groups,
            tiles=tiles,
            DOUBLE=double,
            BLOCK=block,
            **_OPTIONS,
        )
        _rows[(pairs * tiles,)](
            e_ptr=embeddings,
            partial_ptr=partial,
            rows_ptr=rows,
            alpha_ptr=alpha,
            beta_ptr=beta,
            seed=seed,
            offset=offset,
            samples=samples,
            tokens=tokens,
            width=width,
            stride_c=embeddings.stride(0),
            stride_t=embeddings.stride(1),
            stride_d=embeddings.stride(2),
            groups=groups,
            tiles=tiles,
            min_cosine=min_cosine,
            min_sine=sine(min_cosine),
            max_cosine=max_cosine,
            max_sine=sine(max_cosine),
            max_distance=max_distance,
            guard=GUARD,
            DOUBLE=double,
            BLOCK=block,
            BLOCK_WIDTH=triton.next_power_of_2(width),
            TILES=triton.next_power_of_2(tiles),
            **_OPTIONS,
        )
    return rows, alpha, beta
