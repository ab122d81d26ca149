"""Projection of rows by all layers, with LoRA factors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from realera_fast.ops.checks import (
    check_matrix,
    check_projection,
    needs_gradients,
    without_gradients,
)
from realera_fast.ops.trust import believe


def project(
    x: Tensor,
    weight: Tensor,
    *,
    down: Tensor | None = None,
    up: Tensor | None = None,
    heights: Sequence[int] | None = None,
    scaling: float = 1.0,
) -> Tensor:
    """Rows times the weights of many layers at once, each with its LoRA part.

    ``y_l = x W_l^T + scaling (x A_l^T) B_l^T``. Gradients go to ``down`` and ``up`` alone: ``x``
    and ``weight`` are constants, whatever their ``requires_grad``.

    Args:
        x: `[n, d]` rows: float32, bfloat16, float16 or float64.
        weight: `[m, d]` the weights W_l one below the other, of the same dtype.
        down: `[l, r, d]` LoRA factors A_l, of the same dtype or, as master factors are, float32;
            or None.
        up: `[m, r]` LoRA factors B_l one below the other, likewise.
        heights: the number of rows of each of the l weights; None for one weight alone.
        scaling: factor of the LoRA part.

    Returns:
        `[n, m]` of the dtype of ``x``.
    """
    check_matrix("x", x)
    heights = check_projection("x", x, weight, down, up, heights)
    x, weight = without_gradients(x, weight)
    believe("project", x.device, x.dtype)
    if needs_gradients(down, up):
        believe("project_backward", x.device, x.dtype)
    return torch.ops.realera_fast.project(x, weight, down, up, heights, scaling)
