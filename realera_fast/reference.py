"""Every operation in plain PyTorch: the definition that native and Triton code is tested against.

The functions run on any device and dtype, on the meta device too, so they branch on shapes only,
never on values. They assume checked arguments; the checks are in :mod:`realera_fast.ops`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from realera_fast import philox

_CONDITION_STEPS = 5
"""Power steps of the condition estimate. LAPACK's ``lacn2`` stops after at most five as well."""


def normal_equations_(
    gram: Tensor, cross: Tensor, source: Tensor, destination: Tensor, weight: Tensor
) -> None:
    """Adds ``sum_i w_i x_i x_i^T`` to ``gram`` and ``sum_i w_i (y_i - x_i) x_i^T`` to ``cross``.

    The rows are converted to float64 block by block, so the memory is O(d^2) for any ``n``.

    Args:
        gram: `[d, d]` float64, symmetric, changed in place.
        cross: `[d, d]` float64, changed in place.
        source: `[n, d]` rows x.
        destination: `[n, d]` rows y.
        weight: `[n]` weights w.
    """
    rows, width = source.shape
    block = max(width, 256)
    for start in range(0, rows, block):
        x = source[start : start + block].to(torch.float64)
        y = destination[start : start + block].to(torch.float64)
        w = weight[start : start + block].to(torch.float64)[:, None]
        product = x.mT @ (w * x)
        # The product is symmetric only up to rounding; its mean with the transpose is so exactly.
        gram += (product + product.mT) / 2
        cross += (w * (y - x)).mT @ x


def solve_spd(gram: Tensor, rhs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Solves ``X gram = rhs`` by Cholesky factorisation.

    Args:
        gram: `[d, d]` or `[l, d, d]` float64, symmetric.
        rhs: `[o, d]` or `[l, o, d]` float64.

    Returns:
        Solution X, shaped like ``rhs``; `[]` or `[l]` int32 ``info`` (0, or the order of the first
        minor that is not positive, in which case X means nothing); `[]` or `[l]` float64 estimate
        of the reciprocal 1-norm condition number (0 if ``info`` is not).
    """
    factor, info = torch.linalg.cholesky_ex(gram)
    solution = torch.cholesky_solve(rhs.mT, factor).mT.contiguous()
    return solution, info, _reciprocal_condition(gram, factor, info)


def _reciprocal_condition(gram: Tensor, factor: Tensor, info: Tensor) -> Tensor:
    """Estimates ``1 / (|A|_1 |A^-1|_1)`` from the Cholesky factor (Higham 1988, LAPACK ``pocon``).

    Args:
        gram: `[..., d, d]` the matrices A.
        factor: `[..., d, d]` their lower Cholesky factors.
        info: `[...]` int32, as :func:`solve_spd` returns it.

    Returns:
        `[...]` float64. It is never below the true value, and rarely above three times that.
    """
    width = gram.shape[-1]
    if gram.numel() == 0:
        return gram.new_ones(gram.shape[:-2])
    index = torch.arange(width, device=gram.device)[:, None]
    # The second start vector defeats matrices built to fool the first (Higham 1988, section 4).
    alternating = (1 - 2 * (index % 2)) * (1 + index.to(gram.dtype) / max(width - 1, 1))
    alternating = alternating.expand(*gram.shape[:-1], 1)
    probe = torch.full_like(alternating, 1 / width)
    inverse_norm = torch.cholesky_solve(alternating, factor).abs().sum((-2, -1)) * (2 / (3 * width))
    for _ in range(_CONDITION_STEPS):
        image = torch.cholesky_solve(probe, factor)
        inverse_norm = torch.maximum(inverse_norm, image.abs().sum((-2, -1)))
        sign = torch.where(image < 0, -1.0, 1.0).to(gram.dtype)
        slope = torch.cholesky_solve(sign, factor)
        probe = (index == slope.abs().argmax(-2, keepdim=True)).to(gram.dtype)
    reciprocal = 1 / (gram.abs().sum(-2).amax(-1) * inverse_norm)
    return torch.where(
        (info == 0) & reciprocal.isfinite(), reciprocal, torch.zeros_like(reciprocal)
    )


def low_rank_update_(
    weights: Sequence[Tensor],
    left: Sequence[Tensor],
    right: Sequence[Tensor],
    offset: Sequence[Tensor],
) -> None:
    """Replaces every ``W`` by ``W + (W left + offset) right``.

    Computed in float32 (in float64 for float64 weights) and rounded once to the weight's dtype.

    Args:
        weights: `[o_i, d]` each, any floating dtype and strides, changed in place.
        left: `[d, k]` each; one for every weight, or one for all.
        right: `[k, d]` each; as many as ``left``.
        offset: `[o_i, k]` each, one for every weight; or none.
    """
    for i, weight in enumerate(weights):
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        shared = 0 if len(left) == 1 else i
        wide = weight.to(dtype)
        thin = wide @ left[shared].to(dtype)
        if offset:
            thin = thin + offset[i].to(dtype)
        weight.copy_(wide + thin @ right[shared].to(dtype))


def perturb(
    embeddings: Tensor,
    samples: int,
    min_cosine: float,
    max_cosine: float,
    max_distance: float,
    seed: int,
    offset: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Draws neighbors of prompt embeddings: see :func:`realera_fast.philox.perturb`."""
    return philox.perturb(embeddings, samples, min_cosine, max_cosine, max_distance, seed, offset)
