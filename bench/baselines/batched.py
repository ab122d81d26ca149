"""UCE and MACE with their loops taken out: sums as matrix products, one batched solve, no inverse.

    W'_l (ridge I + sum x x^T) = ridge W_l + sum W_l y x^T    for all layers l at once

Once their sums are matrix products the two methods are the same computation. Nothing is shared
between layers: every one has its own copy of the system, as in the published codes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from baselines import Rows, for_each, working_dtype

_STACK = 2**28
"""Numbers in the systems of one stack: 1 GB in float32, and the solver needs several such."""


def edit(weights: Sequence[Tensor], rows: Rows | Sequence[Rows], ridge: float) -> list[Tensor]:
    """The edited copies of ``weights``."""
    every = for_each(rows, len(weights))
    edited: list[Tensor] = [torch.empty(0)] * len(weights)
    stacks: dict[tuple[torch.Size, torch.dtype], list[int]] = {}
    for i, weight in enumerate(weights):
        stacks.setdefault((weight.shape, weight.dtype), []).append(i)
    for (shape, _), members in stacks.items():
        size = max(1, _STACK // shape[1] ** 2)
        for start in range(0, len(members), size):
            part = members[start : start + size]
            solved = _solve([weights[i] for i in part], [every[i] for i in part], ridge)
            for i, weight in zip(part, solved, strict=True):
                edited[i] = weight
    return edited


def _solve(weights: list[Tensor], rows: list[Rows], ridge: float) -> list[Tensor]:
    dtype = working_dtype(weights[0])
    wide = torch.stack([weight.to(dtype) for weight in weights])
    gram = torch.empty(len(rows), *[wide.shape[2]] * 2, dtype=dtype, device=wide.device)
    values = torch.empty_like(wide)
    for i, (source, destination, scale) in enumerate(rows):
        x, y = source.to(dtype), destination.to(dtype)
        weighted = scale.to(dtype)[:, None] * x
        torch.mm(x.mT, weighted, out=gram[i])
        # The cheaper of (W Y^T) X and W (Y^T X).
        if len(x) < x.shape[1]:
            torch.mm(wide[i] @ y.mT, weighted, out=values[i])
        else:
            torch.mm(wide[i], y.mT @ weighted, out=values[i])
    gram.diagonal(dim1=1, dim2=2).add_(ridge)
    values.add_(wide, alpha=ridge)
    solved = torch.linalg.solve(gram, values, left=False)
    return [result.to(weights[0].dtype) for result in solved]
