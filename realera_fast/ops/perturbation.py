"""Neighbors of embeddings: drawn, projected, summed."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from realera_fast.ops import perturb_reference
from realera_fast.ops.checks import (
    check_devices,
    check_drawn,
    check_embeddings,
    check_projection,
    check_sums,
    count_versions,
    needs_gradients,
    without_gradients,
)
from realera_fast.ops.trust import believe


def perturb(
    embeddings: Tensor,
    samples: int,
    min_cosine: float,
    max_cosine: float,
    max_distance: float,
    seed: int,
    *,
    offset: int = 0,
    concept_offset: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Draws the scalars of random neighbors of prompt embeddings inside a region.

    A sample is ``x = alpha E + beta v`` with Gaussian ``v = rms(E) z`` (RealEra, arXiv 2410.09140,
    neighbor-concept mining). Each is accepted: the steps inside the region form one interval. The
    numbers come from a counter-based generator, so equal seeds and counters give equal bits on
    every device. The samples themselves: `perturb_rows`, and without storing
    them `perturb_project`, `perturb_accumulate_`.

    Args:
        embeddings: `[c, t, d]` prompt embeddings E; row 0, begin-of-text, never moves.
        samples: number of samples `s` of each prompt.
        min_cosine: least cosine between E and a sample.
        max_cosine: greatest cosine between E and a sample.
        max_distance: greatest distance between E and a sample, in units of ``|E|``.
        seed: key of the generator, in [0, 2^63).
        offset: first sample number, so that later calls go on where earlier ones ended.
        concept_offset: first prompt number, likewise.

    Returns:
        alpha, beta and ``scale = beta rms(E)``, `[c, s]`, float64 for float64 embeddings, else
        float32; NaN where a prompt's direction meets no point of the region.
    """
    check_embeddings(embeddings, samples, seed, offset, concept_offset)
    if not -1.0 <= min_cosine < max_cosine <= 1.0:
        name = "min_cosine" if not -1.0 <= min_cosine < 1.0 else "max_cosine"
        raise ValueError(
            f"{name}: expected -1 <= min_cosine < max_cosine <= 1, "
            f"got {min_cosine} and {max_cosine}"
        )
    if not 0.0 < max_distance < math.inf:
        raise ValueError(f"max_distance: expected a positive number, got {max_distance}")
    believe("perturb", embeddings.device, embeddings.dtype)
    with torch.no_grad():
        return torch.ops.realera_fast.perturb(
            embeddings,
            samples,
            min_cosine,
            max_cosine,
            max_distance,
            seed,
            offset,
            concept_offset,
        )


def perturb_rows(
    embeddings: Tensor,
    alpha: Tensor,
    scale: Tensor,
    seed: int,
    *,
    offset: int = 0,
    concept_offset: int = 0,
) -> Tensor:
    """The samples whose scalars `perturb` has drawn: ``alpha E + scale z``.

    Args:
        embeddings, seed, offset, concept_offset: as given to `perturb`.
        alpha, scale: `[c, s]` as returned by it.

    Returns:
        `[c, s, t, d]` of the embeddings' dtype.
    """
    check_drawn(embeddings, alpha, scale, seed, offset, concept_offset)
    believe("perturb_rows", embeddings.device, embeddings.dtype)
    with torch.no_grad():
        return torch.ops.realera_fast.perturb_rows(
            embeddings, alpha, scale, seed, offset, concept_offset
        )


def perturb_project(
    embeddings: Tensor,
    alpha: Tensor,
    scale: Tensor,
    weight: Tensor,
    seed: int,
    *,
    down: Tensor | None = None,
    up: Tensor | None = None,
    heights: Sequence[int] | None = None,
    scaling: float = 1.0,
    offset: int = 0,
    concept_offset: int = 0,
) -> Tensor:
    """`project` of the samples of `perturb`, which are drawn block by block and not stored.

    Memory beside arguments and result is at most 64 MiB. Gradients go to ``down`` and ``up`` alone.

    Args:
        embeddings, seed, offset, concept_offset: as given to `perturb`.
        alpha, scale: `[c, s]` as returned by it.
        weight, down, up, heights, scaling: as for `project`; ``weight`` has the embeddings' dtype.

    Returns:
        `[c, s, t, m]` of the embeddings' dtype.
    """
    check_drawn(embeddings, alpha, scale, seed, offset, concept_offset)
    heights = check_projection("embeddings", embeddings, weight, down, up, heights)
    embeddings, alpha, scale, weight = without_gradients(embeddings, alpha, scale, weight)
    believe("perturb_project", embeddings.device, embeddings.dtype)
    if needs_gradients(down, up):
        believe("perturb_project_backward", embeddings.device, embeddings.dtype)
    return torch.ops.realera_fast.perturb_project(
        embeddings,
        alpha,
        scale,
        weight,
        down,
        up,
        heights,
        scaling,
        seed,
        offset,
        concept_offset,
    )


def perturb_accumulate_(
    gram: Tensor,
    cross: Tensor,
    embeddings: Tensor,
    alpha: Tensor,
    scale: Tensor,
    weight: Tensor,
    seed: int,
    *,
    destination: Tensor | None = None,
    relative: bool = False,
    offset: int = 0,
    concept_offset: int = 0,
) -> None:
    """Adds the samples of `perturb` to the normal equations (`normal_equations_`), in place.

    The samples are drawn block by block, in float32 for 16-bit embeddings, and not stored: memory
    beside the arguments is O(d^2).

    Args:
        gram, cross: `[d, d]` float64, contiguous; ``gram`` is symmetric.
        embeddings, seed, offset, concept_offset: as given to `perturb`.
        alpha, scale: `[c, s]` as returned by it.
        weight: `[c, t]` weight of each sample of a token, of any floating dtype.
        destination: `[c, t, d]` where the samples of a token go; None: they stay, and ``cross`` is
            not changed.
        relative: whether a sample x goes to ``x + destination`` instead.
    """
    check_drawn(embeddings, alpha, scale, seed, offset, concept_offset)
    flat = embeddings.flatten(0, 1)
    if weight.shape != embeddings.shape[:2]:
        raise ValueError(
            f"weight: expected {list(embeddings.shape[:2])}, one for each token, "
            f"got {list(weight.shape)}"
        )
    check_sums(flat, weight.flatten(), "embeddings", gram=gram, cross=cross)
    if destination is not None:
        if destination.shape != embeddings.shape or not destination.is_floating_point():
            raise ValueError(
                f"destination: expected floating point numbers of shape {list(embeddings.shape)} "
                f"like embeddings, got {destination.dtype} {list(destination.shape)}"
            )
        check_devices(embeddings=embeddings, destination=destination)
    believe(
        "perturb_accumulate_", embeddings.device, perturb_reference.exact_dtype(embeddings.dtype)
    )
    with torch.no_grad():
        torch.ops.realera_fast.perturb_accumulate_(
            gram,
            cross,
            embeddings,
            alpha,
            scale,
            weight,
            destination,
            relative,
            seed,
            offset,
            concept_offset,
        )
    count_versions(gram, cross)
