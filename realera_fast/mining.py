"""Neighbor-concept mining and beyond-concept regularisation (RealEra, arXiv 2410.09140).

A prompt embedding is moved at random inside a region given by cosine and distance. Neighbors, close
to a target, follow it to the anchor; points further out ("beyond") keep their place. Both are rows
of the closed form, and both can be sampled or, as the noise is Gaussian, summed over infinitely
many samples at once (`moments`), which costs no samples and has no sampling noise.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from realera_fast import ops, perturbation
from realera_fast.closed_form import NormalEquations
from realera_fast.settings import check_types

MODES = ("vocabulary", "gaussian", "offset", "none")
"""Where neighbors come from; see `MiningConfig.mode`."""

_BEYOND_OFFSET = 1 << 31
"""Sample counter of the first beyond sample: they never share noise with neighbors of one seed."""

_SCALARS_PER_BLOCK = 1 << 16
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
        nearest = perturbation.sine(self.max_cosine) if self.max_cosine > 0 else 1.0
        if self.max_distance <= nearest:
            raise ValueError(
                f"Region is empty: no point within {self.max_distance} |E| has a cosine of at most "
                f"{self.max_cosine}; max_distance must exceed {nearest:.4g}"
            )


@dataclass(frozen=True, kw_only=True)
class MiningConfig:
    """How associated concepts are found and how much they, and their surroundings, weigh.

    The paper publishes neither its cosine bounds nor its radii: defaults marked (ours) are this
    library's choice.
    """

    mode: str = "vocabulary"
    """Source of neighbors. "vocabulary": the tokenizer's own words whose prompts fall inside the
    neighbor region; "gaussian": isotropic noise, mapped to where the target goes (the paper: to
    the anchor, which `PairsConfig.negative_guidance=0` asks for); "offset": the same noise, whose
    offset from the target is kept, e + eta -> a + eta; "none": no mining. In every mode the
    preserve prior leaves the neighborhood's words out, so these are always looked for. Default
    (ours): words did best of all on the embedded model (docs/quality.md)."""
    samples: int | None = None
    """Samples per prompt and region, a count; `None` takes the limit of infinitely many in closed
    form. Default (ours): the limit has no sampling noise and a cost independent of the count."""
    min_cosine: float = 0.5
    """S1, no unit: neighbors have at least this cosine with the target, beyond samples less.
    Default (ours): the paper gives no value; 0.5 is used by an independent re-implementation."""
    max_cosine: float = 0.9
    """S2, no unit: neighbors have at most this cosine with the target. Default (ours): the paper
    gives no value; 0.9 is used by an independent re-implementation."""
    max_distance: float = 1.6
    """D1, in units of the embedding's norm: longest step of a neighbor. Default (ours): the paper
    gives no value; a radius of 400 at a norm of 246 (Stable Diffusion 1.4) in an independent
    re-implementation."""
    beyond_distance: float = 1.6
    """D2, in units of the embedding's norm: longest step of a beyond sample. Default (ours): equal
    to D1."""
    neighbor_scale: float = 1.0
    """Weight of all noise neighbors of a prompt together, in units of the prompt's own weight; in
    vocabulary mode of each mined word, where a named one has `erase_scale`. Default (ours): as much
    as the target itself."""
    beyond_scale: float = 0.1
    """Weight of all beyond samples of a prompt together, in units of the prompt's own weight.
    Default (ours): enough to hold directions that no other row defends, too little to hold the
    target."""
    max_words: int = 64
    """Most words that are erased with a concept, a count; more that are in its neighborhood are
    neither erased nor preserved, and the report warns of them. Default (ours)."""
    word_cosine: float = 0.6
    """No unit: least cosine between a word and the target, after the mean over all words is taken
    out, for the word to be in its neighborhood. Default (ours)."""
    member_words: int = 256
    """Concepts of kind "explicit", which name a category: so many words, nearest to its name, are
    drawn to see whether they are members of it (`members`), a count. The size of latents and
    batches, the guidance scale and the precision are those of `AlignmentConfig`. Each word takes 8
    passes of the U-Net for every name of the category and for two more prompts: hours on a CPU for
    Stable Diffusion. A name that the model does not know finds what it happens to draw: read the
    report's neighbors. 0 goes by the text alone, as models do that the noise alignment does not run
    on. Default (ours)."""
    member_cosine: float = 0.42
    """The same, no unit: least cosine between where a word and where the category's name push the
    predicted noise for the word to be a neighbor. Default (ours): between members and others of
    plant, food, clothing and building on a small model; vehicle and animal overlap."""

    def __post_init__(self) -> None:
        check_types(self)
        if self.mode not in MODES:
            raise ValueError(f"MiningConfig.mode must be one of {MODES}, got {self.mode!r}")
        if self.samples is not None and not 1 <= self.samples <= _BEYOND_OFFSET:
            raise ValueError(
                f"MiningConfig.samples must be from 1 to 2**31, or None, got {self.samples}"
            )
        for name in ("neighbor_scale", "beyond_scale"):
            value = getattr(self, name)
            if not 0.0 <= value < math.inf:
                raise ValueError(f"MiningConfig.{name} must be finite and at least 0, got {value}")
        for name in ("max_words", "member_words"):
            count = getattr(self, name)
            if count < 0:
                raise ValueError(f"MiningConfig.{name} must not be negative, got {count}")
        for name in ("word_cosine", "member_cosine"):
            if not -1.0 <= getattr(self, name) <= 1.0:
                raise ValueError(
                    f"MiningConfig.{name} must be from -1 to 1, got {getattr(self, name)}"
                )
        # Both regions are built once here, so that a bad window fails where it was written.
        _ = self.neighbor_region, self.beyond_region

    @property
    def neighbor_region(self) -> Region:
        """Where neighbors lie: cosine in [S1, S2], step at most D1."""
        return Region(self.min_cosine, self.max_cosine, self.max_distance)

    @property
    def beyond_region(self) -> Region:
        """Where beyond samples lie: cosine below S1, step at most D2."""
        return Region(-1.0, self.min_cosine, self.beyond_distance)


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
    `realera_fast.philox`.

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


@lru_cache(maxsize=256)
def moments(elements: int, region: Region) -> Moments:
    """The limit of infinitely many samples, by quadrature over the noise.

    In units |E| = 1 the noise is v = g E + v_perp with g ~ N(0, 1/N) and N |v_perp|^2 ~ chi^2 with
    N - 1 degrees of freedom; the step is uniform in `perturbation.interval(g, |v_perp|)`, over
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
    low, high = perturbation.interval(
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


def add_neighbors(
    equations: NormalEquations,
    source: Tensor,
    destination: Tensor,
    weight: Tensor,
    config: MiningConfig,
    *,
    seed: int,
) -> int:
    """Adds the neighbor and beyond rows of one concept to the normal equations.

    Per token i with weight w, source e and destination a, x a sample around the whole prompt:

        neighbors, weight w neighbor_scale:  x -> a  ("offset" mode: x -> x + a - e)
        beyond,    weight w beyond_scale:    x -> x

    each the mean over the samples, or its limit where `config.samples` is None. The begin-of-text
    row does not move, so it enters as itself. Memory is O(d^2) beside one block of samples.

    Args:
        equations: the accumulator.
        source: `[p, t, d]` prompt embeddings of the target, each moved as a whole.
        destination: `[p, t, d]` their anchors.
        weight: `[p, t]` weight of every row, 0 for rows that are not used.
        config: mode, regions, scales and samples.
        seed: key of the random stream; give every concept its own (`philox.fold_seed`). Not used
            in expectation.

    Returns:
        the number of perturbed prompts drawn, 0 in expectation and for mode "none".

    Raises:
        ValueError: wrong shapes, a mode that draws no noise ("vocabulary" neighbors are found
            elsewhere), or a region that an embedding can't reach.
    """
    if config.mode == "none":
        return 0
    if config.mode == "vocabulary":
        raise ValueError(
            'mode "vocabulary" has no noise to add: pass its words as pairs, or choose "gaussian" '
            'or "offset"'
        )
    if source.dim() != 3 or destination.shape != source.shape:
        raise ValueError(
            "source and destination must both be [p, t, d], "
            f"got {list(source.shape)} and {list(destination.shape)}"
        )
    if weight.shape != source.shape[:2]:
        raise ValueError(f"weight must be {list(source.shape[:2])}, got {list(weight.shape)}")
    if source.shape[2] != equations.width:
        raise ValueError(f"source must have width {equations.width}, got {source.shape[2]}")
    if source.numel() == 0:
        return 0
    device = equations.device
    # Half-precision embeddings would round x to 3 digits; every row is used once, so widen them.
    wide = torch.float64 if source.dtype == torch.float64 else torch.float32
    source, destination = source.to(device, wide), destination.to(device, wide)
    weight = weight.to(device, torch.float64)
    if config.samples is None:
        _add_expectation(equations, source, destination, weight, config)
        return 0
    return _add_samples(equations, source, destination, weight, config, seed)


def _terms(config: MiningConfig) -> Iterator[tuple[bool, Region, float]]:
    """The terms that have weight: whether the anchor is the destination, the region, the scale."""
    if config.neighbor_scale > 0:
        yield True, config.neighbor_region, config.neighbor_scale
    if config.beyond_scale > 0:
        yield False, config.beyond_region, config.beyond_scale


def _add_samples(
    equations: NormalEquations,
    source: Tensor,
    destination: Tensor,
    weight: Tensor,
    config: MiningConfig,
    seed: int,
) -> int:
    assert config.samples is not None
    width = equations.width
    gram = torch.zeros((width, width), dtype=torch.float64, device=equations.device)
    cross = torch.zeros_like(gram)
    drawn = 0
    step = max(1, _SCALARS_PER_BLOCK // source.shape[0])
    for anchored, region, scale in _terms(config):
        relative = config.mode == "offset"
        target = destination - source if relative else destination
        for start in range(0, config.samples, step):
            points = sample(
                source,
                region,
                samples=min(step, config.samples - start),
                seed=seed,
                offset=start + (0 if anchored else _BEYOND_OFFSET),
            )
            ops.perturb_accumulate_(
                gram,
                cross,
                source,
                points.alpha,
                points.scale,
                weight * (scale / config.samples),
                seed,
                destination=target if anchored else None,
                relative=relative,
                offset=points.offset,
            )
        drawn += source.shape[0] * config.samples
    equations.update_moments(gram, cross)
    return drawn


def _add_expectation(
    equations: NormalEquations,
    source: Tensor,
    destination: Tensor,
    weight: Tensor,
    config: MiningConfig,
) -> None:
    """`_add_samples` in the limit of infinitely many samples."""
    prompts, tokens, width = source.shape
    elements = (tokens - 1) * width
    e = source.to(torch.float64)
    a = destination.to(torch.float64)
    moving = e[:, 1:]
    square = moving.square().sum((1, 2))
    if elements and not bool(((square > 0) & square.isfinite()).all()):
        raise ValueError("source holds NaN, infinity or a zero embedding, which can't be mined")
    for anchored, region, scale in _terms(config):
        gram = e.new_zeros(equations.width, equations.width)
        cross = torch.zeros_like(gram)
        for p in range(prompts):
            w = weight[p] * scale
            m = moments(elements, region)
            first = torch.full_like(w, m.first)
            second = torch.full_like(w, m.second)
            first[0] = second[0] = 1.0

            outer = e[p].mT @ ((w * second)[:, None] * e[p])
            weighted = w[1:, None] * moving[p]
            outer -= m.noise * (weighted.mT @ moving[p])
            outer.diagonal().add_(m.noise * float(square[p]) * float(w[1:].sum()))
            gram += (outer + outer.mT) / 2
            if anchored and config.mode == "offset":
                cross += ((w * first)[:, None] * (a[p] - e[p])).mT @ e[p]
            elif anchored:
                cross += ((w * first)[:, None] * a[p]).mT @ e[p] - outer
        equations.update_moments(gram, cross if anchored else None)
