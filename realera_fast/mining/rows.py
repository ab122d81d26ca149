"""Neighbors become rows of the normal equations, drawn or in expectation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from realera_fast.mining.config import MiningConfig
from realera_fast.mining.region import BEYOND_OFFSET, SCALARS_PER_BLOCK, Region, moments, sample
from realera_fast.solver import NormalEquations


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


class _Term(NamedTuple):
    """Neighbors or beyond samples: where they lie, whether they move and what they weigh."""

    region: Region
    scale: float
    """In units of the prompt's own weight."""
    anchored: bool
    """Whether samples go to the anchor; else they stay."""


def _terms(config: MiningConfig) -> Iterator[_Term]:
    """The terms that have weight."""
    if config.noise_scale > 0:
        yield _Term(config.neighbor_region, config.noise_scale, anchored=True)
    if config.beyond_scale > 0:
        yield _Term(config.beyond_region, config.beyond_scale, anchored=False)


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
    step = max(1, SCALARS_PER_BLOCK // source.shape[0])
    relative = config.mode == "offset"
    target = destination - source if relative else destination
    for term in _terms(config):
        for start in range(0, config.samples, step):
            points = sample(
                source,
                term.region,
                samples=min(step, config.samples - start),
                seed=seed,
                offset=start + (0 if term.anchored else BEYOND_OFFSET),
            )
            points.accumulate_(
                gram,
                cross,
                weight * (term.scale / config.samples),
                destination=target if term.anchored else None,
                relative=relative,
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
    for term in _terms(config):
        gram = e.new_zeros(equations.width, equations.width)
        cross = torch.zeros_like(gram)
        for p in range(prompts):
            w = weight[p] * term.scale
            m = moments(elements, term.region)
            first = torch.full_like(w, m.first)
            second = torch.full_like(w, m.second)
            first[0] = second[0] = 1.0

            outer = e[p].mT @ ((w * second)[:, None] * e[p])
            weighted = w[1:, None] * moving[p]
            outer -= m.noise * (weighted.mT @ moving[p])
            outer.diagonal().add_(m.noise * float(square[p]) * float(w[1:].sum()))
            gram += (outer + outer.mT) / 2
            if term.anchored and config.mode == "offset":
                cross += ((w * first)[:, None] * (a[p] - e[p])).mT @ e[p]
            elif term.anchored:
                cross += ((w * first)[:, None] * a[p]).mT @ e[p] - outer
        equations.update_moments(gram, cross if term.anchored else None)
