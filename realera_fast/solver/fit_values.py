"""Destinations of its own for each layer."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from realera_fast import ops
from realera_fast.solver.closed_form import NormalEquations, SolveInfo
from realera_fast.solver.config import check_ridge
from realera_fast.solver.least_squares import (
    Factored,
    Scaled,
    Solved,
    dual_rows,
    is_good,
    primal,
    with_ridge,
)
from realera_fast.solver.rows import Pairs


def fit_values_(
    weights: Sequence[Tensor],
    source: Tensor,
    values: Sequence[Tensor],
    weight: Tensor,
    *,
    ridge: float,
    preserved: NormalEquations | None = None,
) -> SolveInfo:
    """Edits every projection, in place, towards outputs of its own: one A, per-layer destinations.

    Minimises ``sum_i w_i |W' x_i - v_i|^2 + sum_p w_p |W' p - W p|^2 + ridge |W' - W|_F^2`` for
    each W with its values v (MACE, arXiv 2403.06135, equation 7, where v are outputs of other
    weights; RECE, arXiv 2407.12383).

    Args:
        weights: `[o_i, d]` each, changed in place.
        source: `[n, d]` embedding rows x.
        values: `[n, o_i]` each: the outputs that the rows should have.
        weight: `[n]` weights w, not negative.
        ridge: weight of ``|W' - W|_F^2``, positive.
        preserved: rows that keep their output, and other moments; nothing in it may move.

    Returns:
        How the solve went; the rank is that of the update before any cut.

    Raises:
        ValueError: unusable arguments; no weight is changed then.
        SingularSystemError: A is not positive definite to working precision.
    """
    check_ridge(ridge)
    if len(values) != len(weights):
        raise ValueError(
            f"values: expected {len(weights)} tensors, one for each weight, got {len(values)}"
        )
    Pairs(source, source, weight).check()
    width, dtype = source.shape[1], torch.float32
    for i, (matrix, value) in enumerate(zip(weights, values, strict=True)):
        if matrix.dim() != 2 or matrix.shape[1] != width:
            raise ValueError(
                f"weights[{i}]: expected shape [o, {width}] (the width of source), "
                f"got {list(matrix.shape)}"
            )
        if value.shape != (len(source), matrix.shape[0]):
            raise ValueError(
                f"values[{i}]: expected shape {[len(source), matrix.shape[0]]} (an output for each "
                f"row of source), got {list(value.shape)}"
            )
        if not math.isfinite(float(value.sum(dtype=torch.float64))):
            raise ValueError(f"values[{i}]: holds NaN or infinity")
        dtype = torch.promote_types(dtype, matrix.dtype)
    if preserved is not None and preserved.width != width:
        raise ValueError(f"preserved: expected a width of {width}, got {preserved.width}")
    if preserved is not None and preserved.moves:
        raise ValueError("preserved: holds rows that move")
    root = weight.to(torch.float64).sqrt()[:, None]
    x = root * source.to(torch.float64)
    solved = _rows_solved(x, ridge, preserved)
    ops.low_rank_update_(
        weights,
        (-x.mT).to(dtype).contiguous(),
        solved.left.to(dtype),
        [(root * value.to(torch.float64)).mT.to(dtype).contiguous() for value in values],
    )
    return SolveInfo(
        method=solved.method,
        condition=solved.condition,
        residual_ratio=solved.residual_ratio,
        rank=len(source),
        dropped=0.0,
        rows=len(source),
    )


def _rows_solved(x: Tensor, ridge: float, preserved: NormalEquations | None) -> Solved:
    """`[n, d]` rows ``X A^-1`` in ``left``."""
    empty = preserved is None or preserved.is_empty
    if len(x) < x.shape[1]:
        base: Scaled | Factored = Scaled(ridge)
        if preserved is not None and not empty:
            base = Factored(with_ridge(preserved.gram.to(x.device), ridge))
        if base.usable:
            found = dual_rows(x, base)
            solved = Solved(found.rows, None, "dual", found.conditions[0], found.residual_ratios[0])
            if is_good(solved):
                return solved
    gram = with_ridge(x.mT @ x, ridge)
    rows_seen = len(x)
    if preserved is not None and not empty:
        gram += preserved.gram.to(x.device)
        rows_seen += preserved.rows
    return primal(gram, x, ridge, rows_seen)
