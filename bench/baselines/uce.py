"""UCE (Gandikota et al., arXiv 2308.14761), equation 7, looped as it is published.

    W' = (ridge W + sum_i w_i (W y_i) x_i^T) (ridge I + sum_i w_i x_i x_i^T)^-1

One outer product for each row and layer, one explicit inverse for each layer, in float32. Rows to
preserve are rows whose destination is their source.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from baselines import Rows, for_each, working_dtype


def edit(weights: Sequence[Tensor], rows: Rows | Sequence[Rows], ridge: float) -> list[Tensor]:
    """The edited copies of ``weights``."""
    edited = []
    for weight, (source, destination, scale) in zip(
        weights, for_each(rows, len(weights)), strict=True
    ):
        dtype = working_dtype(weight)
        wide, x, y = weight.to(dtype), source.to(dtype), destination.to(dtype)
        values = ridge * wide
        gram = ridge * torch.eye(wide.shape[1], dtype=dtype, device=wide.device)
        for row, target, w in zip(x, y, scale.to(dtype), strict=True):
            values += w * torch.outer(wide @ target, row)
            gram += w * torch.outer(row, row)
        edited.append((values @ torch.linalg.inv(gram)).to(weight.dtype))
    return edited
