"""The library's counter-based random stream, and `perturb` drawn from it: both are definitions.

Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) turns a
64-bit key and a 128-bit counter into four 32-bit words. Here it is plain PyTorch integer
arithmetic, equal bit by bit to Triton's `tl.philox`, `tl.randint4x`, `tl.rand4x`, on every device.

Layout of the counters. The key is the seed; for an embedding of shape `[t, d]`

    normal of (concept, sample, token >= 1, column):  counter (column // 4, token, sample, concept),
        of the four normals of that call the one numbered column % 4
    uniform of (concept, sample):                     counter (0, 0, sample, concept), first word

The begin-of-text row (token 0) never moves, so it draws no noise and its counters are free for the
uniform. Words become uniforms as in `tl.rand4x` and uniforms become normals by Box-Muller as in
`tl.randn4x`: words 0, 1 give normals 0 (cosine), 1 (sine); words 2, 3 give normals 2, 3. Nothing
depends on the number of concepts, samples or tokens: any tile can be drawn again anywhere.

The transcendental functions of Box-Muller are taken in float64 and rounded once to float32, so that
the value does not depend on the vector width, thread or position that computed it. A kernel that
takes them in float32 agrees within float32 rounding; the 32-bit words agree exactly.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

GUARD = 2.0**-16
"""Both ends of the accepted interval move inwards by this fraction.

Float32 rounding of the two scalars, or of the sums they come from, then can't carry a sample out of
its region; it shifts the distribution of the step length by less than 2e-5 of itself.
"""

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
"""Types of embeddings that the mining takes."""

_WORD = 0xFFFFFFFF
_ROUND_A, _ROUND_B = 0xD2511F53, 0xCD9E8D57
_KEY_A, _KEY_B = 0x9E3779B9, 0xBB67AE85
_UNIFORM_SCALE = 4.6566127342e-10
_ELEMENTS_PER_BLOCK = 1 << 20


def philox(
    seed: int, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox 4x32-10.

    Args:
        seed: the 64-bit key; low half first.
        c0, c1, c2, c3: int64 tensors that broadcast together, each holding one 32-bit word of the
            counter.

    Returns:
        four int64 tensors of the broadcast shape with values in [0, 2^32).
    """
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(10):
        # int64 multiplication wraps modulo 2^64, so the product's bits are those of the unsigned
        # one and masking after the (sign-extending) shift leaves its high word.
        a, b = c0 * _ROUND_A, c2 * _ROUND_B
        c0 = ((b >> 32) & _WORD) ^ c1 ^ k0
        c2 = ((a >> 32) & _WORD) ^ c3 ^ k1
        c1, c3 = b & _WORD, a & _WORD
        k0, k1 = (k0 + _KEY_A) & _WORD, (k1 + _KEY_B) & _WORD
    c0, c1, c2, c3 = torch.broadcast_tensors(c0, c1, c2, c3)
    return c0, c1, c2, c3


def randint4x(seed: int, offset: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four words in [0, 2^32) for every element of the int64 `offset`, as `tl.randint4x`."""
    zero = torch.zeros_like(offset)
    return philox(seed, offset & _WORD, (offset >> 32) & _WORD, zero, zero)


def uniform(words: Tensor) -> Tensor:
    """Float32 uniforms in [0, 1) from 32-bit words held in int64, as `tl.rand` makes them."""
    # Triton reads the word as int32 and folds the negative half back by its complement.
    folded = torch.where(words >= 1 << 31, _WORD - words, words)
    return folded.to(torch.float32) * torch.tensor(_UNIFORM_SCALE, dtype=torch.float32)


def box_muller(
    u1: Tensor, u2: Tensor, compute: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """Two float32 normals from two float32 uniforms, as `tl.randn4x` makes them.

    Args:
        u1, u2: uniforms of one shape.
        compute: type of logarithm, root, sine and cosine. Float64 is the definition; float32 is
        what
            a plain PyTorch program would do, kept to measure how far such a program is from it.
    """
    # The angle is a float32 number by definition: rounding it later would cost 1e-7 of a turn.
    angle = (u2 * torch.tensor(2 * math.pi, dtype=torch.float32)).to(compute)
    floor = torch.tensor(1e-7, dtype=torch.float32, device=u1.device)
    radius = torch.sqrt(-2.0 * torch.log(torch.maximum(u1, floor).to(compute)))
    return (radius * torch.cos(angle)).float(), (radius * torch.sin(angle)).float()


def randn4x(seed: int, offset: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four float32 normals for every element of the int64 `offset`: the stream of `tl.randn4x`."""
    i0, i1, i2, i3 = randint4x(seed, offset)
    n0, n1 = box_muller(uniform(i0), uniform(i1))
    n2, n3 = box_muller(uniform(i2), uniform(i3))
    return n0, n1, n2, n3


def fold_seed(seed: int, index: int) -> int:
    """A seed in [0, 2^63) for stream number `index` of `seed`: one per concept, per step, ..."""
    low, high, _, _ = randint4x(check_seed(seed), torch.tensor(check_seed(index, "index")))
    return int(low) | (int(high) & 0x7FFFFFFF) << 32


def normals(
    seed: int,
    concept: Tensor,
    sample: Tensor,
    tokens: int,
    width: int,
    compute: torch.dtype = torch.float64,
) -> Tensor:
    """The noise of some samples.

    Args:
        seed: the key.
        concept, sample: `[k]` int64 counters of the wanted samples.
        tokens: number of tokens t of the prompt, begin-of-text included.
        width: text width d.
        compute: see `box_muller`.

    Returns:
        `[k, t - 1, d]` float32 normals of tokens 1 to t - 1.
    """
    device = concept.device
    groups = -(-width // 4)
    column = torch.arange(groups, device=device).view(1, 1, -1)
    token = torch.arange(1, tokens, device=device).view(1, -1, 1)
    words = philox(seed, column, token, sample.view(-1, 1, 1), concept.view(-1, 1, 1))
    u0, u1, u2, u3 = (uniform(word) for word in words)
    four = (*box_muller(u0, u1, compute), *box_muller(u2, u3, compute))
    return torch.stack(four, dim=-1).flatten(-2)[..., :width]


def step_uniforms(seed: int, concept: Tensor, sample: Tensor) -> Tensor:
    """`[k]` float32 uniforms that place each sample's step inside its accepted interval."""
    zero = torch.zeros_like(sample)
    return uniform(philox(seed, zero, zero, sample, concept)[0])


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

    def reach(cosine: float) -> Tensor:
        denominator = perpendicular * cosine + (1.0 - parallel) * sine(cosine)
        return torch.where(denominator > 0, sine(cosine) / denominator, torch.inf)

    distance = torch.sqrt(perpendicular.square() + (1.0 - parallel).square())
    low = torch.zeros_like(parallel) if max_cosine >= 1.0 else reach(max_cosine)
    high = torch.minimum(max_distance / distance, reach(min_cosine))
    return low * (1.0 + GUARD), high * (1.0 - GUARD)


def check_seed(seed: int, name: str = "seed") -> int:
    """`seed` if it is an integer in [0, 2^63).

    Raises:
        TypeError: not an integer.
        ValueError: out of range.
    """
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"{name} must be an integer, got {type(seed).__name__}")
    if not 0 <= seed < 1 << 63:
        raise ValueError(f"{name} must be in [0, 2^63), got {seed}")
    return seed


def check_perturb(
    embeddings: Tensor,
    samples: int,
    min_cosine: float,
    max_cosine: float,
    max_distance: float,
    seed: int,
    offset: int,
) -> None:
    """Refuses arguments that `perturb` does not define.

    Raises:
        ValueError: embeddings that are not `[c, t, d]`, a negative or too large number of samples,
        a
            region that holds no direction or no distance, a seed or offset out of range.
        TypeError: embeddings that are not floating point.
    """
    if embeddings.dim() != 3:
        raise ValueError(f"embeddings must be [c, t, d], got shape {tuple(embeddings.shape)}")
    if embeddings.dtype not in FLOATS:
        raise TypeError(f"embeddings must be float32, 64, 16 or bfloat16, got {embeddings.dtype}")
    if samples < 0:
        raise ValueError(f"samples must not be negative, got {samples}")
    if offset < 0 or offset + samples > 1 << 32:
        raise ValueError(
            f"offset + samples must be in the sample counter [0, 2^32], got {offset} + {samples}"
        )
    if not -1.0 <= min_cosine < max_cosine <= 1.0:
        raise ValueError(
            "the cosine window needs -1 <= min_cosine < max_cosine <= 1, "
            f"got [{min_cosine}, {max_cosine}]"
        )
    if not 0.0 < max_distance < math.inf:
        raise ValueError(f"max_distance must be positive and finite, got {max_distance}")
    if not 0 <= seed < 1 << 63:
        raise ValueError(f"seed must be in [0, 2^63), got {seed}")


@torch.no_grad()
def perturb(
    embeddings: Tensor,
    samples: int,
    min_cosine: float,
    max_cosine: float,
    max_distance: float,
    seed: int,
    offset: int = 0,
    *,
    factor: Tensor | None = None,
    compute: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor]:
    """Random points around prompt embeddings, inside a region (RealEra, arXiv 2410.09140, mining).

    Per concept and sample, with E the embedding without its begin-of-text row, N = (t - 1) d:

        v ~ N(0, sigma^2 I),  sigma = rms(E),   x = alpha E + beta v,   alpha = 1 - beta
        beta uniform over the interval in which cos(E, x) is in [min_cosine, max_cosine]
        and |x - E| <= max_distance |E|                                       (see `interval`)

    which is the step rho = beta |v - E| / |E| along v - E, drawn uniformly among the accepted ones.
    Sums are taken in float64 over a fixed tree, so a sample's bits do not depend on the batch, the
    offset or the number of threads. The rows use alpha and beta as returned.

    Args:
        embeddings: `[c, t, d]` prompt embeddings; row 0 is begin-of-text.
        samples: s, samples per concept.
        min_cosine, max_cosine: window of the cosine between E and x.
        max_distance: longest step in units of |E|.
        seed: key of the random stream, in [0, 2^63).
        offset: counter of the first sample; s samples from offset o are samples o to o + s of the
            same stream.
        factor: `[d, d]` F; every row of v is sigma F z instead of sigma z.
        compute: type of all inner arithmetic. Float64 is the definition (see `box_muller`).

    Returns:
        rows `[c, s, t, d]` of the embeddings' type; row 0 and, where t = 1, everything is unmoved.
        alpha, beta `[c, s]`, float64 for float64 embeddings, else float32. Where the direction
        drawn meets no point of the region, or E is zero or not finite, alpha, beta and the moved
        rows are NaN: `realera_fast.mining` turns that into an error (a kernel can't without
        stopping the device).
    """
    check_perturb(embeddings, samples, min_cosine, max_cosine, max_distance, seed, offset)
    concepts, tokens, width = embeddings.shape
    device = embeddings.device
    exact = torch.float64 if embeddings.dtype == torch.float64 else torch.float32
    rows = embeddings.new_empty((concepts, samples, tokens, width))
    alpha = torch.ones((concepts, samples), dtype=exact, device=device)
    beta = torch.zeros((concepts, samples), dtype=exact, device=device)
    rows[:, :, :1] = embeddings[:, None, :1]
    elements = (tokens - 1) * width
    if rows.numel() == 0 or elements == 0:
        return rows, alpha, beta

    moved = embeddings[:, 1:].to(compute)
    square = _tree_sum(moved.square().flatten(1))
    pairs = concepts * samples
    flat_rows, flat_alpha, flat_beta = (
        rows.view(pairs, tokens, width),
        alpha.view(-1),
        beta.view(-1),
    )
    step = max(1, _ELEMENTS_PER_BLOCK // elements)
    for start in range(0, pairs, step):
        pair = torch.arange(start, min(start + step, pairs), device=device)
        concept, sample = pair // samples, pair % samples + offset
        noise = normals(seed, concept, sample, tokens, width, compute).to(compute)
        if factor is not None:
            noise = noise @ factor.to(device, compute).mT
        base, base_square = moved[concept], square[concept]
        parallel = _tree_sum((base * noise).flatten(1)) / torch.sqrt(base_square * elements)
        total = _tree_sum(noise.square().flatten(1)) / elements
        perpendicular = torch.sqrt((total - parallel.square()).clamp_min(0.0))
        low, high = interval(parallel, perpendicular, min_cosine, max_cosine, max_distance)
        uniforms = step_uniforms(seed, concept, sample).to(compute)
        drawn = torch.where(low <= high, low + uniforms * (high - low), torch.nan)
        block = slice(start, start + len(pair))
        flat_beta[block] = drawn
        flat_alpha[block] = 1.0 - drawn
        scale = flat_beta[block].to(compute) * torch.sqrt(base_square / elements)
        out = flat_alpha[block].to(compute).view(-1, 1, 1) * base + scale.view(-1, 1, 1) * noise
        flat_rows[block, 1:] = out.to(rows.dtype)
    return rows, alpha, beta


def _tree_sum(x: Tensor) -> Tensor:
    """`[k, n]` -> `[k]`, adding halves: the order depends on n alone, not on k or threads."""
    while x.shape[1] > 1:
        half = (x.shape[1] + 1) // 2
        folded = x[:, :half].clone()
        folded[:, : x.shape[1] - half] += x[:, half:]
        x = folded
    return x[:, 0]
