"""Neighbor-concept mining and beyond-concept regularisation (RealEra, arXiv 2410.09140).

A prompt embedding is moved at random inside a region given by cosine and distance. Neighbors, close
to a target, follow it to the anchor; points further out ("beyond") keep their place. Both are rows
of the closed form, and both can be sampled or, as the noise is Gaussian, summed over infinitely
many samples at once (`moments`), which costs no samples and has no sampling noise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from realera_fast import ops
from realera_fast.ops import perturb_reference

BEYOND_OFFSET = 1 << 31
"""Sample counter of the first beyond sample: they never share noise with neighbors of one seed."""

SCALARS_PER_BLOCK = 1 << 16
_NODES = 128
_EMPTY_MASS = 1e-4


@dataclass(frozen=True)
class Region:
    """Points x around an embedding E with a cosine and a distance in given ranges.

    Accepted: `min_cosine <= cos(E, x) <= max_cosine` and `|x - E| <= max_distance |E|`, over the
    whole prompt without its begin-of-text row. The region is relative to |E|, so that it means the
    same for every text encoder.

    Raises:
        ValueError: a window or distance that no point satisfies.
    """

    min_cosine: float
    """Least cosine between E and x; -1 sets no bound."""
    max_cosine: float
    """Greatest cosine between E and x; 1 sets no bound."""
    max_distance: float
    """Longest step |x - E|, in units of |E|."""

    def __post_init__(self) -> None:
        if not -1.0 <= self.min_cosine < self.max_cosine <= 1.0:
            raise ValueError(
                "Region is empty: it needs -1 <= min_cosine < max_cosine <= 1, "
                f"got min_cosine={self.min_cosine}, max_cosine={self.max_cosine}"
            )
        if not 0.0 < self.max_distance < math.inf:
            raise ValueError(
                f"Region.max_distance must be positive and finite, got {self.max_distance}"
            )
        # The nearest point at a given angle is the foot of the perpendicular from E, or the origin.
        nearest = perturb_reference.sine(self.max_cosine) if self.max_cosine > 0 else 1.0
        if self.max_distance <= nearest:
            raise ValueError(
                f"Region is empty: no point within {self.max_distance} |E| has a cosine of at most "
                f"{self.max_cosine}; max_distance must exceed {nearest:.4g}"
            )


@dataclass(frozen=True, eq=False)
class Samples:
    """Points around prompt embeddings, as scalars and the place of their noise in the stream.

    `x = alpha E + beta v` with `v = rms(E) z`. The noise is not kept: it is drawn again by whoever
    needs it.
    """

    embeddings: Tensor
    """`[c, t, d]` what the points lie around."""
    alpha: Tensor
    """`[c, s]` how much of the embedding is left."""
    beta: Tensor
    """`[c, s]` how much noise is added, in units of its draw v."""
    scale: Tensor
    """`[c, s]` how much noise is added, in units of z."""
    seed: int
    """Key of the random stream."""
    offset: int
    """Counter of the first sample."""
    concept_offset: int = 0
    """Counter of the first embedding."""

    def rows(self) -> Tensor:
        """`[c, s, t, d]` the points themselves, in the embeddings' type."""
        return ops.perturb_rows(
            self.embeddings,
            self.alpha,
            self.scale,
            self.seed,
            offset=self.offset,
            concept_offset=self.concept_offset,
        )

    def project(
        self,
        weight: Tensor,
        *,
        down: Tensor | None = None,
        up: Tensor | None = None,
        heights: Sequence[int] | None = None,
        scaling: float = 1.0,
    ) -> Tensor:
        """`[c, s, t, m]`: `ops.project` of the points, which are not stored."""
        return ops.perturb_project(
            self.embeddings,
            self.alpha,
            self.scale,
            weight,
            self.seed,
            down=down,
            up=up,
            heights=heights,
            scaling=scaling,
            offset=self.offset,
            concept_offset=self.concept_offset,
        )

    def accumulate_(
        self,
        gram: Tensor,
        cross: Tensor,
        weight: Tensor,
        *,
        destination: Tensor | None = None,
        relative: bool = False,
    ) -> None:
        """`ops.perturb_accumulate_` of the points, which are not stored.

        Args:
            gram, cross: `[d, d]` float64, changed in place.
            weight: `[c, t]` weight of each point's token.
            destination: `[c, t, d]` where the points go; None: they stay.
            relative: whether a point x goes to `x + destination` instead.
        """
        ops.perturb_accumulate_(
            gram,
            cross,
            self.embeddings,
            self.alpha,
            self.scale,
            weight,
            self.seed,
            destination=destination,
            relative=relative,
            offset=self.offset,
            concept_offset=self.concept_offset,
        )


@dataclass(frozen=True)
class Moments:
    """Expectation of samples around an embedding E, in units |E| = 1.

    With v = g E + v_perp a sample is x = (alpha + beta g) E + beta v_perp. For token i:

        E[x_i] = first e_i
        E[x_i x_i^T] = second e_i e_i^T + noise (|E|^2 I - e_i e_i^T)
    """

    first: float
    """E[alpha + beta g]."""
    second: float
    """E[(alpha + beta g)^2]."""
    noise: float
    """E[beta^2 |v_perp|^2] / (N - 1): variance of one element, N elements in all."""


def sample(
    embeddings: Tensor,
    region: Region,
    *,
    samples: int,
    seed: int,
    offset: int = 0,
    concept_offset: int = 0,
) -> Samples:
    """Draws points of a region around prompt embeddings (RealEra, arXiv 2410.09140, mining).

    The same seed draws the same points on every device; samples `o` to `o + s` of `offset=o` are
    those of one longer draw. The layout of the random stream is written down in
    `realera_fast.ops.philox`.

    Args:
        embeddings: `[c, t, d]` prompt embeddings; row 0 is begin-of-text and never moves.
        region: where the points lie.
        samples: points per prompt.
        seed: key of the random stream, in [0, 2^63); use `philox.fold_seed` to derive one per step.
        offset: counter of the first sample.
        concept_offset: counter of the first embedding: parts of a batch draw what the whole does.

    Returns:
        the samples.

    Raises:
        ValueError: a direction was drawn along which no point of the region lies (possible for very
            small prompts and narrow regions), or an embedding is zero or not finite.
    """
    alpha, beta, scale = ops.perturb(
        embeddings,
        samples,
        region.min_cosine,
        region.max_cosine,
        region.max_distance,
        seed,
        offset=offset,
        concept_offset=concept_offset,
    )
    bad = beta.isnan()
    if bool(bad.any()):
        concept = int(bad.any(1).nonzero()[0])
        moving = embeddings[concept, 1:]
        if not bool(moving.isfinite().all()):
            why = "it holds NaN or infinity"
        elif not bool(moving.any()):
            why = "it is zero, which has no direction"
        else:
            why = (
                f"{int(bad[concept].sum())} of {samples} directions meet no point of {region}; "
                "widen the cosine window or raise max_distance"
            )
        raise ValueError(f"embeddings[{concept}] can't be mined: {why}")
    return Samples(embeddings, alpha, beta, scale, seed, offset, concept_offset)


def retract(points: Tensor, embeddings: Tensor, region: Region) -> Tensor:
    """Moves points back along the line to their embedding until they are in the region.

    Args:
        points: `[c, t, d]`; row 0 is that of the embedding.
        embeddings: `[c, t, d]` what each lies around.
        region: its greatest cosine does not bind: a point that is too near stays where it is.

    Returns:
        `[c, t, d]` of the points' type; points of the region are returned as they are.
    """
    center = embeddings.double()
    moved = points.double()
    e, x = center[:, 1:].flatten(1), moved[:, 1:].flatten(1)
    square = (e * e).sum(1).clamp_min(torch.finfo(torch.float64).tiny)
    parallel = (e * x).sum(1) / square
    across = x - parallel[:, None] * e
    perpendicular = across.square().sum(1).div(square).sqrt()
    _, high = perturb_reference.interval(
        parallel, perpendicular, region.min_cosine, 1.0, region.max_distance
    )
    step = high.clamp_max(1.0)[:, None, None]
    return torch.where(step < 1.0, center + step * (moved - center), moved).to(points.dtype)


@lru_cache(maxsize=256)
def moments(elements: int, region: Region) -> Moments:
    """The limit of infinitely many samples, by quadrature over the noise.

    In units |E| = 1 the noise is v = g E + v_perp with g ~ N(0, 1/N) and N |v_perp|^2 ~ chi^2 with
    N - 1 degrees of freedom; the step is uniform in `perturb_reference.interval(g, |v_perp|)`, over
    which the integrals are polynomials.

    Args:
        elements: N = (t - 1) d, the elements that move.
        region: where the samples lie.

    Returns:
        the three moments; without elements, those of a prompt that does not move.

    Raises:
        ValueError: more than one direction in 10,000 meets no point of the region.
    """
    if elements == 0:
        return Moments(1.0, 1.0, 0.0)
    if elements == 1:
        raise ValueError("mining needs at least two elements (tokens x width) that move, got one")
    nodes, weights = _legendre(_NODES)
    # Beyond 9 standard deviations a Gaussian holds less than 1e-18; a chi variable has a standard
    # deviation of at most 0.71.
    degrees = elements - 1
    deviation = math.sqrt(1.0 / elements)
    g = 9.0 * deviation * nodes
    g_mass = weights * torch.exp(-0.5 * (g / deviation).square())
    low_edge = max(0.0, math.sqrt(degrees) - 6.5)
    half_width = (math.sqrt(degrees) + 6.5 - low_edge) / 2
    chi = low_edge + half_width * (1.0 + nodes)
    log_density = (degrees - 1) * torch.log(chi) - chi.square() / 2
    chi_mass = weights * torch.exp(log_density - log_density.max())
    mass = g_mass[:, None] * chi_mass
    mass = mass / mass.sum()

    parallel = g[:, None].expand_as(mass)
    perpendicular = chi.expand_as(mass) * deviation
    low, high = perturb_reference.interval(
        parallel, perpendicular, region.min_cosine, region.max_cosine, region.max_distance
    )
    accepted = low <= high
    kept = float((mass * accepted).sum())
    if 1.0 - kept > _EMPTY_MASS:
        raise ValueError(
            f"{1.0 - kept:.2g} of all directions around an embedding of {elements} elements meet "
            f"no point of {region}; widen the cosine window or raise max_distance"
        )
    mass = torch.where(accepted, mass, 0.0) / kept
    low, high = torch.where(accepted, low, 0.0), torch.where(accepted, high, 0.0)
    mean = (low + high) / 2
    square = (low.square() + low * high + high.square()) / 3
    away = 1.0 - parallel
    first = float((mass * (1.0 - mean * away)).sum())
    second = float((mass * (1.0 - 2.0 * mean * away + square * away.square())).sum())
    noise = float((mass * square * perpendicular.square()).sum()) / (elements - 1)
    return Moments(first, second, noise)


@lru_cache(maxsize=4)
def _legendre(count: int) -> tuple[Tensor, Tensor]:
    """Gauss-Legendre nodes and weights on [-1, 1] (Golub and Welsch 1969)."""
    k = torch.arange(1, count, dtype=torch.float64, device="cpu")
    off_diagonal = k / torch.sqrt(4 * k.square() - 1)
    nodes, vectors = torch.linalg.eigh(torch.diag(off_diagonal, 1) + torch.diag(off_diagonal, -1))
    return nodes, 2 * vectors[0].square()
