"""Every operation in plain PyTorch: the definition that native and Triton code is tested against.

The functions run on any device and dtype, on the meta device too, so they branch on shapes only,
never on values. They assume checked arguments; the checks are in :mod:`realera_fast.ops`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from realera_fast.ops import perturb_reference

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


def gram_(gram: Tensor, source: Tensor, weight: Tensor) -> None:
    """Adds ``sum_i w_i x_i x_i^T`` to ``gram``: the normal equations of rows that stay.

    Args:
        gram: `[d, d]` float64, symmetric, changed in place.
        source: `[n, d]` rows x.
        weight: `[n]` weights w.
    """
    rows, width = source.shape
    block = max(width, 256)
    for start in range(0, rows, block):
        x = source[start : start + block].to(torch.float64)
        w = weight[start : start + block].to(torch.float64)[:, None]
        product = x.mT @ (w * x)
        gram += (product + product.mT) / 2


def project(
    x: Tensor,
    weight: Tensor,
    down: Tensor | None,
    up: Tensor | None,
    heights: Sequence[int],
    scaling: float,
) -> Tensor:
    """Rows times the stacked weights of many layers, with the LoRA part of each layer.

    ``y_l = x W_l^T + scaling ((x A_l^T) B_l^T)``, where both products of the LoRA part are rounded
    to the dtype of ``x``, as LoRA layers do.

    Args:
        x: `[n, d]` rows.
        weight: `[m, d]` the weights W_l one below the other, of the same dtype.
        down: `[l, r, d]` LoRA factors A_l, or None; rounded to the dtype of ``x`` if they are
            wider.
        up: `[m, r]` LoRA factors B_l one below the other, likewise, or None.
        heights: the number of rows of each W_l; their sum is m.
        scaling: factor of the LoRA part.

    Returns:
        `[n, m]`, of the same dtype.
    """
    outputs = []
    start = 0
    for layer, height in enumerate(heights):
        y = x @ weight[start : start + height].mT
        if down is not None and up is not None:
            hidden = x @ down[layer].to(x.dtype).mT
            y = y + scaling * (hidden @ up[start : start + height].to(x.dtype).mT)
        outputs.append(y)
        start += height
    return torch.cat(outputs, dim=1) if outputs else x.new_empty(len(x), 0)


def project_backward(
    grad: Tensor, x: Tensor, down: Tensor, up: Tensor, heights: Sequence[int], scaling: float
) -> tuple[Tensor, Tensor]:
    """Gradients of :func:`project` for the LoRA factors.

    ``dA_l = scaling (g_l B_l)^T x`` and ``dB_l = scaling g_l^T (x A_l^T)``.

    Args:
        grad: `[n, m]` gradient of the result.
        x, down, up, heights, scaling: as for :func:`project`.

    Returns:
        `[l, r, d]` and `[m, r]` gradients of ``down`` and ``up``, in float32 (float64 for float64
        ``x``): they are sums over all rows, and master factors are float32.
    """
    exact = perturb_reference.exact_dtype(x.dtype)
    grad_down = torch.empty(down.shape, dtype=exact, device=x.device)
    grad_up = torch.empty(up.shape, dtype=exact, device=x.device)
    start = 0
    for layer, height in enumerate(heights):
        part = slice(start, start + height)
        g = grad[:, part]
        grad_up[part] = scaling * (g.mT @ (x @ down[layer].to(x.dtype).mT)).to(exact)
        grad_down[layer] = scaling * ((g @ up[part].to(x.dtype)).mT @ x).to(exact)
        start += height
    return grad_down, grad_up


perturb = perturb_reference.perturb
perturb_rows = perturb_reference.perturb_rows


def perturb_project(
    embeddings: Tensor,
    alpha: Tensor,
    scale: Tensor,
    weight: Tensor,
    down: Tensor | None,
    up: Tensor | None,
    heights: Sequence[int],
    scaling: float,
    seed: int,
    offset: int,
    concept_offset: int,
) -> Tensor:
    """:func:`project` of :func:`perturb_rows`.

    Args:
        embeddings, alpha, scale, seed, offset, concept_offset: as for
            :func:`perturb_rows`.
        weight, down, up, heights, scaling: as for :func:`project`.

    Returns:
        `[c, s, t, m]`, of the dtype of ``embeddings``.
    """
    rows = perturb_rows(embeddings, alpha, scale, seed, offset, concept_offset)
    y = project(rows.flatten(0, 2), weight, down, up, heights, scaling)
    return y.view(*rows.shape[:3], len(weight))


def perturb_project_backward(
    grad: Tensor,
    embeddings: Tensor,
    alpha: Tensor,
    scale: Tensor,
    down: Tensor,
    up: Tensor,
    heights: Sequence[int],
    scaling: float,
    seed: int,
    offset: int,
    concept_offset: int,
) -> tuple[Tensor, Tensor]:
    """:func:`project_backward` of :func:`perturb_rows`.

    Args:
        grad: `[c, s, t, m]` gradient of the result of :func:`perturb_project`.
        embeddings, alpha, scale, seed, offset, concept_offset: as for
            :func:`perturb_rows`.
        down, up, heights, scaling: as for :func:`project`.

    Returns:
        `[l, r, d]` and `[m, r]`, as :func:`project_backward`.
    """
    rows = perturb_rows(embeddings, alpha, scale, seed, offset, concept_offset)
    flat = grad.flatten(0, 2), rows.flatten(0, 2)
    return project_backward(*flat, down, up, heights, scaling)


def perturb_accumulate_(
    gram: Tensor,
    cross: Tensor,
    embeddings: Tensor,
    alpha: Tensor,
    scale: Tensor,
    weight: Tensor,
    destination: Tensor | None,
    relative: bool,
    seed: int,
    offset: int,
    concept_offset: int,
) -> None:
    """:func:`normal_equations_` of :func:`perturb_rows`.

    Args:
        gram, cross: `[d, d]` float64, changed in place.
        embeddings, alpha, scale, seed, offset, concept_offset: as for
            :func:`perturb_rows`; the rows of 16-bit embeddings are taken in float32.
        weight: `[c, t]` weight of every sample of a token.
        destination: `[c, t, d]` where the samples of a token go; None: they stay.
        relative: whether they go to ``x + destination`` instead.
    """
    wide = embeddings.to(perturb_reference.exact_dtype(embeddings.dtype))
    x = perturb_rows(wide, alpha, scale, seed, offset, concept_offset)
    if destination is None:
        y = x
    else:
        y = destination[:, None].to(x.dtype).expand_as(x)
        y = x + y if relative else y
        # What has no weight has no part, even if it is not finite.
        y = torch.where(weight[:, None, :, None] != 0, y, x)
    rows_weight = weight[:, None].expand(x.shape[:3]).flatten()
    normal_equations_(gram, cross, x.flatten(0, 2), y.flatten(0, 2), rows_weight)
