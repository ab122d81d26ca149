"""The ops `perturb` and `perturb_rows` in Triton, equal to `ops.perturb_reference` to the bit.

Scalars of all samples: `_norms` sums every prompt once, `_sums` draws the noise and adds E.z and
|z|^2, `_scalars` solves for the accepted interval. Rows: `_rows` draws the same noise again from
its counters and writes alpha E + scale z. The sums are of integers, so tiles and atomics leave
their bits alone.

Floor. A number costs about 22 float32 and 20 integer instructions (ten rounds of Philox serve four
numbers, Box-Muller two), 0.4 cycles of a multiprocessor, and is drawn twice: on an H100 the
arithmetic of 2.7e11 elements a second outweighs the 2 bytes of each that are written. Storing the
noise between the two passes would move 8 bytes an element and take about as long.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from realera_fast.kernels.rounding import rounded
from realera_fast.ops import perturb_reference, philox

_BLOCK = 512
"""Groups of four columns per program, four per thread; fewer for a prompt smaller than that."""
_NORM_BLOCK = 1024
_PAIRS = 128

_OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}
"""Launch options. Fused multiply-adds would round once where the definition rounds twice."""

_LOG: tl.constexpr = tl.constexpr(philox.LOG)
_SINE: tl.constexpr = tl.constexpr(philox.SINE)
_COSINE: tl.constexpr = tl.constexpr(philox.COSINE)
_SMALLEST: tl.constexpr = tl.constexpr(philox.SMALLEST_UNIFORM)
_ROOT_HALF: tl.constexpr = tl.constexpr(philox.ROOT_HALF_BITS)
_LN2_HIGH: tl.constexpr = tl.constexpr(philox.LN2_HIGH)
_LN2_LOW: tl.constexpr = tl.constexpr(philox.LN2_LOW)
_EXPONENT: tl.constexpr = tl.constexpr(perturb_reference.EXPONENT_BITS)
_NORM_SCALE: tl.constexpr = tl.constexpr(perturb_reference.NORM_SCALE)
_GUARD: tl.constexpr = tl.constexpr(perturb_reference.GUARD)


@triton.jit
def _normal_pair(u1, u2):
    """`philox.box_muller`, operation by operation."""
    u1 = tl.maximum(u1, _SMALLEST)
    bits = u1.to(tl.int32, bitcast=True) - _ROOT_HALF
    exponent = (bits >> 23).to(tl.float32)
    f = ((bits & 0x7FFFFF) + _ROOT_HALF).to(tl.float32, bitcast=True) - 1.0
    square = f * f
    p = f * _LOG[7] + _LOG[6]
    p = p * f + _LOG[5]
    p = p * f + _LOG[4]
    p = p * f + _LOG[3]
    p = p * f + _LOG[2]
    p = p * f + _LOG[1]
    p = p * f + _LOG[0]
    y = square * (f * p - 0.5)
    logarithm = exponent * _LN2_HIGH + (f + (y + exponent * _LN2_LOW))
    radius = tl.sqrt_rn(logarithm * -2.0)

    quadrant = tl.floor(u2 * 4.0 + 0.5)
    r = u2 - quadrant * 0.25
    square = r * r
    s = square * _SINE[3] + _SINE[2]
    s = s * square + _SINE[1]
    s = s * square + _SINE[0]
    s = r * s
    c = square * _COSINE[3] + _COSINE[2]
    c = c * square + _COSINE[1]
    c = c * square + _COSINE[0]
    c = square * c + 1.0
    turn = quadrant.to(tl.int32)
    odd = (turn & 1) == 1
    cosine = tl.where(odd, s, c)
    sine = tl.where(odd, c, s)
    cosine = tl.where(((turn + 1) & 2) == 2, -cosine, cosine)
    sine = tl.where((turn & 2) == 2, -sine, sine)
    return radius * cosine, radius * sine


@triton.jit
def _tile_noise(seed, first, sample, concept, groups, BLOCK: tl.constexpr):
    """Normals of `BLOCK` column groups from flat group `first` of a prompt on, `[4 * BLOCK]`."""
    i = first + tl.arange(0, BLOCK)
    token = (i // groups).to(tl.uint32)
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
    token = i // (4 * groups)
    column = i % (4 * groups)
    return token, column, (token < tokens) & (column < width)


@triton.jit
def _norms(
    e_ptr,
    root_ptr,
    tokens,
    width,
    stride_c,
    stride_t,
    stride_d,
    BLOCK: tl.constexpr,
):
    """`perturb_reference.rms`, a program for each prompt."""
    concept = tl.program_id(0).to(tl.int64)
    elements = (tokens - 1) * width
    i = tl.arange(0, BLOCK)
    largest = tl.zeros([BLOCK], tl.float64)
    bad = tl.zeros([BLOCK], tl.int32)
    for start in range(0, elements, BLOCK):
        token = 1 + (start + i) // width
        column = (start + i) % width
        place = token.to(tl.int64) * stride_t + column.to(tl.int64) * stride_d
        e = tl.load(e_ptr + concept * stride_c + place, mask=start + i < elements, other=0.0)
        size = tl.abs(e.to(tl.float32) if e.dtype != tl.float64 else e).to(tl.float64)
        finite = size < float("inf")
        bad = tl.where(finite, bad, 1)
        largest = tl.maximum(largest, tl.where(finite, size, 0.0))
    bits = tl.max(largest, 0).to(tl.int64, bitcast=True) & _EXPONENT
    unit = bits.to(tl.float64, bitcast=True)
    total = tl.zeros([BLOCK], tl.int64)
    for start in range(0, elements, BLOCK):
        token = 1 + (start + i) // width
        column = (start + i) % width
        place = token.to(tl.int64) * stride_t + column.to(tl.int64) * stride_d
        e = tl.load(e_ptr + concept * stride_c + place, mask=start + i < elements, other=0.0)
        scaled = (e.to(tl.float32) if e.dtype != tl.float64 else e).to(tl.float64) / unit
        scaled = tl.where(bits > 0, tl.where(scaled == scaled, scaled, 0.0), 0.0)
        total += (scaled * scaled * _NORM_SCALE + 0.5).to(tl.int64)
    mean = tl.sum(total, 0).to(tl.float64) / _NORM_SCALE / tl.cast(elements, tl.float64)
    root = unit * tl.sqrt(mean)
    good = (bits > 0) & (tl.max(bad, 0) == 0)
    tl.store(root_ptr + concept, tl.where(good, root, float("nan")))


@triton.jit(do_not_specialize=["seed", "offset", "concept_offset"])
def _sums(
    e_ptr,
    root_ptr,
    sums_ptr,
    seed: tl.int64,
    offset: tl.int64,
    concept_offset: tl.int64,
    samples,
    tokens,
    width,
    stride_c,
    stride_t,
    stride_d,
    groups,
    tiles,
    product_scale: tl.float32,
    square_scale: tl.float32,
    DOUBLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Adds a tile to E.z / rms(E) and |z|^2 of a sample, in fixed point."""
    program = tl.program_id(0).to(tl.int64)
    pair = program // tiles
    first = ((program % tiles) * BLOCK).to(tl.int32)
    concept = pair // samples
    sample = (offset + pair % samples).to(tl.uint32)
    token, column, mask = _tile_places(first, tokens, width, groups, BLOCK)
    mask = mask & (token > 0)
    place = concept * stride_c + token.to(tl.int64) * stride_t + column.to(tl.int64) * stride_d
    e = tl.load(e_ptr + place, mask=mask, other=0.0)
    inverse = 1.0 / tl.load(root_ptr + concept)
    if DOUBLE:
        e = (e * inverse).to(tl.float32)
    else:
        e = e.to(tl.float32) * inverse.to(tl.float32)
    z = _tile_noise(seed, first, sample, (concept_offset + concept).to(tl.uint32), groups, BLOCK)
    inner = (z * e * product_scale).to(tl.int32).to(tl.int64)
    total = (z * z * square_scale).to(tl.int32).to(tl.int64)
    tl.atomic_add(sums_ptr + 2 * pair, tl.sum(tl.where(mask, inner, 0), 0))
    tl.atomic_add(sums_ptr + 2 * pair + 1, tl.sum(tl.where(mask, total, 0), 0))


@triton.jit
def _reach(perpendicular, away, cosine, sine):
    denominator = perpendicular * cosine + away * sine
    return tl.where(denominator > 0, sine / denominator, float("inf"))


@triton.jit(do_not_specialize=["seed", "offset", "concept_offset"])
def _scalars(
    root_ptr,
    sums_ptr,
    alpha_ptr,
    beta_ptr,
    scale_ptr,
    seed: tl.int64,
    offset: tl.int64,
    concept_offset: tl.int64,
    pairs,
    samples,
    elements,
    min_cosine: tl.float64,
    min_sine: tl.float64,
    max_cosine: tl.float64,
    max_sine: tl.float64,
    max_distance: tl.float64,
    product_scale: tl.float64,
    square_scale: tl.float64,
    BLOCK: tl.constexpr,
):
    """`perturb_reference.interval` and the draw from it, a thread for each sample."""
    pair = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = pair < pairs
    concept = pair // samples
    root = tl.load(root_ptr + concept, mask=mask, other=1.0)
    count = tl.cast(elements, tl.float64)
    inner = tl.load(sums_ptr + 2 * pair, mask=mask, other=0).to(tl.float64)
    total = tl.load(sums_ptr + 2 * pair + 1, mask=mask, other=0).to(tl.float64)
    parallel = inner / product_scale / count
    mean_square = total / square_scale / count
    perpendicular = tl.sqrt(tl.maximum(mean_square - parallel * parallel, 0.0))
    away = 1.0 - parallel
    distance = tl.sqrt(perpendicular * perpendicular + away * away)
    low = tl.where(max_cosine >= 1.0, 0.0, _reach(perpendicular, away, max_cosine, max_sine)) * (
        1.0 + _GUARD
    )
    high = tl.minimum(
        max_distance / distance, _reach(perpendicular, away, min_cosine, min_sine)
    ) * (1.0 - _GUARD)
    zero = tl.zeros([BLOCK], tl.uint32)
    word, _, _, _ = tl.philox(
        seed,
        zero,
        zero,
        (offset + pair % samples).to(tl.uint32),
        (concept_offset + concept).to(tl.uint32),
    )
    uniform = tl.uint_to_uniform_float(word).to(tl.float64)
    drawn = low + uniform * (high - low)
    # NaN of a prompt that is zero or not finite makes the second comparison false.
    inverse = (1.0 / root).to(alpha_ptr.dtype.element_ty)
    drawn = tl.where((low <= high) & (inverse < float("inf")), drawn, float("nan"))
    alpha = (1.0 - drawn).to(alpha_ptr.dtype.element_ty)
    beta = drawn.to(beta_ptr.dtype.element_ty)
    scale = beta.to(tl.float64) * root
    tl.store(alpha_ptr + pair, alpha, mask=mask)
    tl.store(beta_ptr + pair, beta, mask=mask)
    tl.store(scale_ptr + pair, scale.to(scale_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["seed", "offset", "concept_offset"])
def _rows(
    e_ptr,
    alpha_ptr,
    scale_ptr,
    rows_ptr,
    seed: tl.int64,
    offset: tl.int64,
    concept_offset: tl.int64,
    samples,
    tokens,
    width,
    stride_c,
    stride_t,
    stride_d,
    stride_alpha,
    stride_scale,
    groups,
    tiles,
    DOUBLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Writes a tile of alpha E + scale z; begin-of-text as it is."""
    program = tl.program_id(0).to(tl.int64)
    pair = program // tiles
    first = ((program % tiles) * BLOCK).to(tl.int32)
    concept = pair // samples
    number = pair % samples
    token, column, mask = _tile_places(first, tokens, width, groups, BLOCK)
    place = concept * stride_c + token.to(tl.int64) * stride_t + column.to(tl.int64) * stride_d
    e = tl.load(e_ptr + place, mask=mask, other=0.0)
    if not DOUBLE:
        e = e.to(tl.float32)
    z = _tile_noise(
        seed,
        first,
        (offset + number).to(tl.uint32),
        (concept_offset + concept).to(tl.uint32),
        groups,
        BLOCK,
    )
    if DOUBLE:
        z = z.to(tl.float64)
    alpha = tl.load(alpha_ptr + concept * stride_alpha + number)
    scale = tl.load(scale_ptr + concept * stride_scale + number)
    x = alpha * e + scale * z
    x = rounded(tl.where(token > 0, x, e), rows_ptr.dtype.element_ty)
    out = pair * tokens * width + token.to(tl.int64) * width + column
    tl.store(rows_ptr + out, x, mask=mask)


def _layout(embeddings: Tensor) -> tuple[int, int, int]:
    """Groups a token, groups a program, programs a sample."""
    _, tokens, width = embeddings.shape
    groups = triton.cdiv(width, 4)
    block = min(_BLOCK, triton.next_power_of_2(tokens * groups))
    return groups, block, triton.cdiv(tokens * groups, block)


def perturb(
    embeddings: Tensor,
    samples: int,
    min_cosine: float,
    max_cosine: float,
    max_distance: float,
    seed: int,
    offset: int,
    concept_offset: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """`realera_fast.ops.perturb`, see there; any strides."""
    concepts, tokens, width = embeddings.shape
    double = embeddings.dtype == torch.float64
    exact = perturb_reference.exact_dtype(embeddings.dtype)
    elements = (tokens - 1) * width
    pairs = concepts * samples
    if pairs == 0 or elements <= 0:
        alpha = embeddings.new_ones((concepts, samples), dtype=exact)
        return alpha, torch.zeros_like(alpha), torch.zeros_like(alpha)
    alpha = embeddings.new_empty((concepts, samples), dtype=exact)
    beta, scale = torch.empty_like(alpha), torch.empty_like(alpha)
    root = embeddings.new_empty((concepts,), dtype=torch.float64)
    sums = embeddings.new_zeros((pairs, 2), dtype=torch.int64)
    groups, block, tiles = _layout(embeddings)
    product_scale = perturb_reference.inner_scale(elements)
    strides = {
        "stride_c": embeddings.stride(0),
        "stride_t": embeddings.stride(1),
        "stride_d": embeddings.stride(2),
    }
    stream = {"seed": seed, "offset": offset, "concept_offset": concept_offset}
    with torch.cuda.device_of(embeddings):
        _norms[(concepts,)](
            e_ptr=embeddings,
            root_ptr=root,
            tokens=tokens,
            width=width,
            **strides,
            BLOCK=_NORM_BLOCK,
            **_OPTIONS,
        )
        _sums[(pairs * tiles,)](
            e_ptr=embeddings,
            root_ptr=root,
            sums_ptr=sums,
            **stream,
            samples=samples,
            tokens=tokens,
            width=width,
            **strides,
            groups=groups,
            tiles=tiles,
            product_scale=product_scale,
            square_scale=perturb_reference.SQUARE_SCALE,
            DOUBLE=double,
            BLOCK=block,
            **_OPTIONS,
        )
        _scalars[(triton.cdiv(pairs, _PAIRS),)](
            root_ptr=root,
            sums_ptr=sums,
            alpha_ptr=alpha,
            beta_ptr=beta,
            scale_ptr=scale,
            **stream,
            pairs=pairs,
            samples=samples,
            elements=elements,
            min_cosine=min_cosine,
            min_sine=perturb_reference.sine(min_cosine),
            max_cosine=max_cosine,
            max_sine=perturb_reference.sine(max_cosine),
            max_distance=max_distance,
            product_scale=product_scale,
            square_scale=perturb_reference.SQUARE_SCALE,
            BLOCK=_PAIRS,
            **_OPTIONS,
        )
    return alpha, beta, scale


def perturb_rows(
    embeddings: Tensor,
    alpha: Tensor,
    scale: Tensor,
    seed: int,
    offset: int,
    concept_offset: int,
) -> Tensor:
    """`realera_fast.ops.perturb_rows`, see there; any strides."""
    concepts, tokens, width = embeddings.shape
    samples = alpha.shape[1]
    pairs = concepts * samples
    rows = embeddings.new_empty((concepts, samples, tokens, width))
    if rows.numel() == 0 or tokens == 1:
        return rows.copy_(embeddings[:, None])
    alpha, scale = (t if t.stride(1) == 1 else t.contiguous() for t in (alpha, scale))
    groups, block, tiles = _layout(embeddings)
    stream = {"seed": seed, "offset": offset, "concept_offset": concept_offset}
    with torch.cuda.device_of(embeddings):
        _rows[(pairs * tiles,)](
            e_ptr=embeddings,
            alpha_ptr=alpha,
            scale_ptr=scale,
            rows_ptr=rows,
            **stream,
            samples=samples,
            tokens=tokens,
            width=width,
            stride_c=embeddings.stride(0),
            stride_t=embeddings.stride(1),
            stride_d=embeddings.stride(2),
            stride_alpha=alpha.stride(0),
            stride_scale=scale.stride(0),
            groups=groups,
            tiles=tiles,
            DOUBLE=embeddings.dtype == torch.float64,
            BLOCK=block,
            **_OPTIONS,
        )
    return rows
