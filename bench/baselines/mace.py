"""MACE closed-form refinement (Lu et al., arXiv 2403.06135), equations 1 and 2, as published.

    W' = (ridge W + sum W y x^T) (ridge I + sum x x^T)^-1

over all tokens of all prompts. For each layer and prompt the outer products of the tokens are made
and then summed; one explicit inverse for each layer, in float32. Here the tokens go in blocks: all
of a prompt at once is several hundred megabytes a layer and no faster.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from baselines import Rows, for_each, working_dtype

TOKENS = 75
"""Rows of a prompt: 77 tokens of CLIP without the two of the concept."""
_BLOCK = 2**22
"""Numbers in one block of outer products."""


def edit(weights: Sequence[Tensor], rows: Rows | Sequence[Rows], ridge: float) -> list[Tensor]:
    """The edited copies of ``weights``."""
    edited = []
    for weight, (source, destination, scale) in zip(
        weights, for_each(rows, len(weights)), strict=True
    ):
        dtype = working_dtype(weight)
        wide, x, y = weight.to(dtype), source.to(dtype), destination.to(dtype)
        w = scale.to(dtype)[:, None]
        values = ridge * wide
        gram = ridge * torch.eye(wide.shape[1], dtype=dtype, device=wide.device)
        for start in range(0, len(x), TOKENS):
            prompt = slice(start, start + TOKENS)
            weighted = w[prompt] * x[prompt]
            _add_outer_products(values, y[prompt] @ wide.mT, weighted)
            _add_outer_products(gram, x[prompt], weighted)
        edited.append((values @ torch.linalg.inv(gram)).to(weight.dtype))
    return edited


def _add_outer_products(total: Tensor, columns: Tensor, rows: Tensor) -> None:
    block = max(1, _BLOCK // total.numel())
    for a, b in zip(columns.split(block), rows.split(block), strict=True):
        total += (a[:, :, None] * b[:, None, :]).sum(0)
