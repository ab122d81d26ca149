"""Random points around prompt embeddings, inside a region: the definition.

RealEra (arXiv 2410.09140), neighbor-concept mining. With E a prompt embedding without its
begin-of-text row, N its number of elements and z standard normal noise (`realera_fast.ops.philox`):

    x = alpha E + beta v,  v = rms(E) z,  alpha = 1 - beta

where beta is uniform over the interval in which cos(E, x) and |x - E| / |E| lie in the region. That
is the step rho = beta |v - E| / |E| along v - E, drawn uniformly among those that are accepted.

The interval needs E.z and |z|^2. Both are sums of integers here, of products in fixed point, so
that they are exact: no order of summation, tile, batch or device changes a bit of them. The few
operations after them are IEEE float64 without fused multiply-adds, and a row is
round(round(alpha e) + round(scale z)). So a kernel either equals this definition to the last bit or
is wrong.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from realera_fast.ops import philox

GUARD = 2.0**-16
"""Both ends of the accepted interval move inwards by this fraction.

Rounding of the scalars, of the sums they come from and of the rows then can't carry a sample out of
its region; it shifts the distribution of the step length by less than 2e-5 of itself.
"""

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
"""Types of embeddings that the mining takes."""

MOST_ELEMENTS = 1 << 21
"""Most elements N of a prompt that move: beyond it the integer sums could overflow."""

NORM_SCALE = 2.0**39
"""Fixed point of squares of E: of numbers below 4."""
SQUARE_SCALE = 2.0**25
"""Fixed point of z^2: of numbers below 32.3, in 32 bits."""
EXPONENT_BITS = 0x7FF0000000000000

_ELEMENTS_PER_BLOCK = 1 << 20


def inner_scale(elements: int) -> float:
    """Fixed point of the elements of E.z / rms(E), in 32 bits: they are below 8 sqrt(N)."""
    return 2.0 ** (28 - ((elements - 1).bit_length() + 1) // 2)


def exact_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type of scalars and arithmetic for embeddings of this type."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def sine(cosine: float) -> float:
    """The sine of the angle in [0, pi] that has this cosine."""
    return math.sqrt(max(0.0, (1.0 - cosine) * (1.0 + cosine)))


def interval(
    parallel: Tensor,
    perpendicular: Tensor,
    min_cosine: float,
    max_cosine: float,
    max_distance: float,
) -> tuple[Tensor, Tensor]:
    """The accepted steps beta of a noise direction, in closed form.

    With v = g E + v_perp, x = (1 - beta) E + beta v, the angle between x and E has the tangent
    beta |v_perp| / (|E| (1 - beta (1 - g))), which grows with beta from 0 to the angle of v - E. So
    the cosine C is met at beta = S / (|v_perp|/|E| C + (1 - g) S), S = sin(arccos C): the law of
    sines in the triangle 0, E, x; where the denominator is not positive, no step along this
    direction reaches it. The distance is beta |v - E|.

    Args:
        parallel: g = E.v / |E|^2, float64.
        perpendicular: |v_perp| / |E|, of the same shape.
        min_cosine, max_cosine, max_distance: the region, distances in units of |E|.

    Returns:
        lowest and highest accepted beta, narrowed by `GUARD`; none is accepted where low > high.
    """

    def divided(number: float, by: Tensor) -> Tensor:
        # PyTorch turns a division of, or on some devices by, a Python number into a product.
        return torch.full_like(by, number) / by

    def reach(cosine: float) -> Tensor:
        denominator = perpendicular * cosine + away * sine(cosine)
        return torch.where(denominator > 0, divided(sine(cosine), denominator), torch.inf)

    away = 1.0 - parallel
    distance = philox.square_root(perpendicular * perpendicular + away * away)
    low = torch.zeros_like(parallel) if max_cosine >= 1.0 else reach(max_cosine)
    high = torch.minimum(divided(max_distance, distance), reach(min_cosine))
    return low * (1.0 + GUARD), high * (1.0 - GUARD)


def rms(embeddings: Tensor) -> Tensor:
    """Root mean square of what moves of each prompt, to about 1e-11 of it.

    NaN where it is zero or not finite.

    Args:
        embeddings: `[c, t, d]`, at least one element that moves.

    Returns:
        `[c]` float64.
    """
    concepts, tokens, width = embeddings.shape
    elements = (tokens - 1) * width
    found = torch.empty(concepts, dtype=torch.float64, device=embeddings.device)
    count = torch.full_like(found[:1], elements)
    step = max(1, _ELEMENTS_PER_BLOCK // elements)
    for start in range(0, concepts, step):
        e = embeddings[start : start + step, 1:].flatten(1).to(torch.float64)
        # The power of two below the largest element; division by it is exact.
        unit = (e.abs().amax(1).view(torch.int64) & EXPONENT_BITS).view(torch.float64)
        scaled = e / unit[:, None]
        fixed = (scaled * scaled * NORM_SCALE + 0.5).to(torch.int64)
        root = unit * philox.square_root(fixed.sum(1).to(torch.float64) / NORM_SCALE / count)
        good = (unit > 0) & (unit < torch.inf)
        found[start : start + step] = torch.where(good, root, torch.nan)
    return found


def perturb(
    embeddings: Tensor,
    samples: int,
    min_cosine: float,
    max_cosine: float,
    max_distance: float,
    seed: int,
    offset: int = 0,
    concept_offset: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """The scalars of random points of a region: see the module.

    Args:
        embeddings: `[c, t, d]` prompt embeddings; row 0 is begin-of-text and never moves.
        samples: s, samples per prompt.
        min_cosine, max_cosine: window of the cosine between E and x.
        max_distance: longest step in units of |E|.
        seed: key of the random stream, in [0, 2^63).
        offset, concept_offset: counters of the first sample and prompt: parts of a longer draw.

    Returns:
        alpha, beta and scale = beta rms(E), `[c, s]`: float64 for float64 embeddings, else float32.
        A prompt without elements that move has alpha 1 and beta 0. Where the direction drawn meets
        no point of the region, or E is zero or not finite, all are NaN: `realera_fast.mining` turns
        that into an error (a kernel can't without stopping the device).
    """
    concepts, tokens, width = embeddings.shape
    device = embeddings.device
    exact = exact_dtype(embeddings.dtype)
    elements = (tokens - 1) * width
    alpha = torch.ones((concepts, samples), dtype=exact, device=device)
    beta = torch.zeros_like(alpha)
    scale = torch.zeros_like(alpha)
    if alpha.numel() == 0 or elements <= 0:
        return alpha, beta, scale
    root = rms(embeddings)
    count = torch.full_like(root[:1], elements)
    product_scale = inner_scale(elements)
    flat = alpha.view(-1), beta.view(-1), scale.view(-1)
    pairs = concepts * samples
    step = max(1, _ELEMENTS_PER_BLOCK // elements)
    for start in range(0, pairs, step):
        pair = torch.arange(start, min(start + step, pairs), device=device)
        concept, sample = pair // samples, pair % samples
        z = philox.normals(seed, concept + concept_offset, sample + offset, tokens, width)
        z = z.flatten(1)
        e = embeddings[concept, 1:].flatten(1).to(exact)
        inverse = (1.0 / root[concept]).to(exact)
        e = (e * inverse[:, None]).to(torch.float32)
        inner = (z * e * product_scale).to(torch.int32).sum(1, dtype=torch.int64)
        total = (z * z * SQUARE_SCALE).to(torch.int32).sum(1, dtype=torch.int64)
        parallel = inner.to(torch.float64) / product_scale / count
        mean_square = total.to(torch.float64) / SQUARE_SCALE / count
        perpendicular = philox.square_root((mean_square - parallel * parallel).clamp_min(0.0))
        low, high = interval(parallel, perpendicular, min_cosine, max_cosine, max_distance)
        uniform = philox.step_uniforms(seed, concept + concept_offset, sample + offset)
        drawn = low + uniform.to(torch.float64) * (high - low)
        good = (low <= high) & inverse.isfinite()
        drawn = torch.where(good, drawn, torch.nan)
        part = slice(start, start + len(pair))
        flat[0][part] = 1.0 - drawn
        flat[1][part] = drawn
        flat[2][part] = flat[1][part].to(torch.float64) * root[concept]
    return alpha, beta, scale


def perturb_rows(
    embeddings: Tensor,
    alpha: Tensor,
    scale: Tensor,
    seed: int,
    offset: int = 0,
    concept_offset: int = 0,
) -> Tensor:
    """The points whose scalars are given: alpha E + scale z.

    Args:
        embeddings: `[c, t, d]` prompt embeddings; row 0 is begin-of-text and never moves.
        seed, offset, concept_offset: as in `perturb`.
        alpha, scale: `[c, s]`, of the type that `perturb` returns for these embeddings.

    Returns:
        `[c, s, t, d]` of the embeddings' type.
    """
    concepts, tokens, width = embeddings.shape
    samples = alpha.shape[1]
    exact = exact_dtype(embeddings.dtype)
    rows = embeddings.new_empty((concepts, samples, tokens, width))
    rows[:, :, :1] = embeddings[:, None, :1]
    if rows.numel() == 0 or tokens == 1:
        return rows
    flat = rows.view(concepts * samples, tokens, width)
    step = max(1, _ELEMENTS_PER_BLOCK // ((tokens - 1) * width))
    for start in range(0, len(flat), step):
        pair = torch.arange(start, min(start + step, len(flat)), device=embeddings.device)
        concept, sample = pair // samples, pair % samples
        z = philox.normals(seed, concept + concept_offset, sample + offset, tokens, width)
        e = embeddings[concept, 1:].to(exact)
        part = slice(start, start + len(pair))
        base = alpha.view(-1)[part, None, None] * e
        flat[part, 1:] = (base + scale.view(-1)[part, None, None] * z.to(exact)).to(rows.dtype)
    return rows
