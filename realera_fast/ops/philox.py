"""The library's counter-based random stream: the definition that every device follows to the bit.

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

Libraries of mathematical functions differ in the last bits, between devices and even between the
body and the tail of a vectorized loop. So `box_muller` takes none: it is a fixed sequence of
float32 additions, multiplications and one square root, each rounded as IEEE 754 says, without
fused multiply-adds. A kernel that does the same operations gives the same bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_ROUND_A, _ROUND_B = 0xD2511F53, 0xCD9E8D57
_KEY_A, _KEY_B = 0x9E3779B9, 0xBB67AE85
_UNIFORM_SCALE = 4.6566127342e-10

SMALLEST_UNIFORM = 1e-7
"""The logarithm takes no smaller uniform, as in `tl.randn4x`: no normal is beyond 5.68."""
LARGEST_NORMAL = 5.68

# Minimax coefficients (relative error below 0.1 units in the last place of float32), lowest first.
LOG = (
    0.3333333134651184,
    -0.250008225440979,
    0.20001226663589478,
    -0.16623356938362122,
    0.14201761782169342,
    -0.131601944565773,
    0.12761549651622772,
    -0.07634429633617401,
)
"""P of log(1 + f) = f - f^2 / 2 + f^3 P(f), 1 + f from sqrt(1/2) to sqrt(2)."""
SINE = (6.2831854820251465, -41.3416633605957, 81.59236145019531, -75.39373779296875)
"""P of sin(2 pi r) = r P(r^2), |r| at most 1/8."""
COSINE = (-19.739208221435547, 64.93932342529297, -85.4432373046875, 59.229248046875)
"""P of cos(2 pi r) = 1 + r^2 P(r^2), |r| at most 1/8."""
ROOT_HALF_BITS = 0x3F3504F3
LN2_HIGH, LN2_LOW = 0.693359375, -2.12194440e-4
"""log(2) in two parts; the first has so few bits that its multiples by an exponent are exact."""


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
    return folded.to(torch.float32) * torch.tensor(
        _UNIFORM_SCALE, dtype=torch.float32, device="cpu"
    )


def _polynomial(x: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    """Horner's rule, every product and sum rounded by itself."""
    total = torch.full_like(x, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        total = total * x + coefficient
    return total


def square_root(x: Tensor) -> Tensor:
    """Square root of float32 or float64 numbers, correctly rounded.

    `torch.sqrt` may call a vector library whose last bit is not right. Rounded from float64 it is
    in float32; in float64 one step of Newton's method mends it, with the square of the root in two
    parts (Dekker 1971).
    """
    if x.dtype == torch.float32:
        return torch.sqrt(x.to(torch.float64)).to(torch.float32)
    root = torch.sqrt(x)
    spread = root * (2.0**27 + 1)
    high = spread - (spread - root)
    low = root - high
    square = root * root
    error = ((high * high - square) + high * low * 2.0) + low * low
    mended = root + ((x - square) - error) / (root * 2.0)
    return torch.where((root > 0) & (root < torch.inf), mended, root)


def box_muller(u1: Tensor, u2: Tensor) -> tuple[Tensor, Tensor]:
    """Two float32 normals from two float32 uniforms: `tl.randn4x`'s, but for rounding.

    sqrt(-2 log(u1)) times cos(2 pi u2) and sin(2 pi u2). The turn is reduced to an eighth before
    it is multiplied by 2 pi, which is exact; a program that multiplies first loses some bits.

    Args:
        u1, u2: uniforms of one shape.
    """
    clamped = u1.clamp_min(SMALLEST_UNIFORM)
    bits = clamped.view(torch.int32) - ROOT_HALF_BITS
    exponent = (bits >> 23).to(torch.float32)
    f = ((bits & 0x7FFFFF) + ROOT_HALF_BITS).view(torch.float32) - 1.0
    square = f * f
    y = square * (f * _polynomial(f, LOG) - 0.5)
    logarithm = exponent * LN2_HIGH + (f + (y + exponent * LN2_LOW))
    radius = square_root(logarithm * -2.0)

    quadrant = torch.floor(u2 * 4.0 + 0.5)
    r = u2 - quadrant * 0.25
    square = r * r
    sin_ = r * _polynomial(square, SINE)
    cosine = square * _polynomial(square, COSINE) + 1.0
    quadrant = quadrant.to(torch.int32)
    odd = (quadrant & 1) == 1
    x, y = torch.where(odd, sin_, cosine), torch.where(odd, cosine, sin_)
    x = torch.where(((quadrant + 1) & 2) == 2, -x, x)
    y = torch.where((quadrant & 2) == 2, -y, y)
    return radius * x, radius * y


def randn4x(seed: int, offset: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four float32 normals for every element of the int64 `offset`: the stream of `tl.randn4x`."""
    i0, i1, i2, i3 = randint4x(seed, offset)
    n0, n1 = box_muller(uniform(i0), uniform(i1))
    n2, n3 = box_muller(uniform(i2), uniform(i3))
    return n0, n1, n2, n3


def fold_seed(seed: int, index: int) -> int:
    """A seed in [0, 2^63) for stream number `index` of `seed`: one per concept, per step, ..."""
    low, high, _, _ = randint4x(
        check_seed(seed), torch.tensor(check_seed(index, "index"), device="cpu")
    )
    return int(low) | (int(high) & 0x7FFFFFFF) << 32


def normals(seed: int, concept: Tensor, sample: Tensor, tokens: int, width: int) -> Tensor:
    """The noise of some samples.

    Args:
        seed: the key.
        concept, sample: `[k]` int64 counters of the wanted samples.
        tokens: number of tokens t of the prompt, begin-of-text included.
        width: text width d.

    Returns:
        `[k, t - 1, d]` float32 normals of tokens 1 to t - 1.
    """
    device = concept.device
    groups = -(-width // 4)
    column = torch.arange(groups, device=device).view(1, 1, -1)
    token = torch.arange(1, tokens, device=device).view(1, -1, 1)
    words = philox(seed, column, token, sample.view(-1, 1, 1), concept.view(-1, 1, 1))
    u0, u1, u2, u3 = (uniform(word) for word in words)
    four = (*box_muller(u0, u1), *box_muller(u2, u3))
    return torch.stack(four, dim=-1).flatten(-2)[..., :width]


def step_uniforms(seed: int, concept: Tensor, sample: Tensor) -> Tensor:
    """`[k]` float32 uniforms that place each sample's step inside its accepted interval."""
    zero = torch.zeros_like(sample)
    return uniform(philox(seed, zero, zero, sample, concept)[0])


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
