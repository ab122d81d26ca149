"""The low-rank form in plain PyTorch, as fast as it allows: the honest competitor.

    W' = W + (W L) R,   L R = D A^-1   (realera_fast.solver.fit_values names A and D)

Sums and solve in float64, update in float32. Few rows: the n x n dual system. Many: Cholesky of the
d x d one. Where the update has a rank above d / 2 the dense product is cheaper.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from baselines import Rows, for_each

_BLOCK = 2**18
"""Numbers of a weight that are updated at once on a CPU, so that they are still in its cache."""

Factors = tuple[Tensor, Tensor | None]
"""`[d, k]` left and `[k, d]` right; or `[d, d]` their product and None."""


def factors(rows: Rows, ridge: float, dtype: torch.dtype = torch.float32) -> Factors:
    """What the update adds to the identity, in the cheaper of its two forms.

    Args:
        rows: of one system; or `[l, n, d]` and `[l, n]` of a batch in which all rows move.
        ridge: positive.
        dtype: of the result.
    """
    n, d = rows.source.shape[-2:]
    select = None
    if rows.source.dim() == 2:
        moves = (rows.source != rows.destination).any(1)
        if not bool(moves.all()):
            select = moves.nonzero()[:, 0]
    k = n if select is None else len(select)
    dual = 2 * n * n * d + n**3 / 3 + 2 * n * n * d + (2 * k * d * d if 2 * k > d else 0)
    primal = 2 * n * d * d + d**3 / 3 + 2 * k * d * d + min(2 * k * d * d, 2 * d**3)
    if dual < primal:
        x, offset = _scaled(rows)
        gram = x @ x.mT
        gram.diagonal(dim1=-2, dim2=-1).add_(ridge)
        right = torch.cholesky_solve(x, torch.linalg.cholesky(gram))
        if select is not None:
            right, offset = right[select], offset[select]
    else:
        moved = rows if select is None else Rows(*(tensor[select] for tensor in rows))
        gram = _sum(rows, False)
        gram.diagonal(dim1=-2, dim2=-1).add_(ridge)
        factor = torch.linalg.cholesky(gram)
        if k > d:
            return torch.cholesky_solve(_sum(moved, True), factor).mT.to(dtype), None
        x, offset = _scaled(moved)
        right = torch.cholesky_solve(x.mT, factor).mT
    if 2 * k > d:
        return (offset.mT @ right).to(dtype), None
    return offset.mT.to(dtype), right.to(dtype)


def _scaled(rows: Rows) -> tuple[Tensor, Tensor]:
    """Sources and how far they move, times the root of the weights, float64."""
    x = rows.source.to(torch.float64)
    root = rows.weight.to(torch.float64).sqrt()[..., None]
    return x * root, (rows.destination.to(torch.float64) - x) * root


def _sum(rows: Rows, cross: bool) -> Tensor:
    """`[..., d, d]` the Gram matrix of the sources; or ``D^T``."""
    n, d = rows.source.shape[-2:]
    # Fresh memory for the float64 rows of a long list costs more than their arithmetic.
    block = n if rows.source.dim() == 3 or rows.source.device.type != "cpu" else max(d, 1024)
    total = None
    for start in range(0, n, block):
        part = (..., slice(start, start + block), slice(None))
        x = rows.source[part].to(torch.float64)
        y = rows.destination[part].to(torch.float64).sub_(x) if cross else x
        weighted = x * rows.weight[..., start : start + block, None].to(torch.float64)
        total = weighted.mT @ y if total is None else total.addmm_(weighted.mT, y)
    assert total is not None
    return total


def factors_of_layers(
    rows: Sequence[Rows], ridge: float, dtype: torch.dtype = torch.float32
) -> list[Factors]:
    """:func:`factors` of every system; in one batch where launches cost more than memory."""
    alike = len({r.source.shape for r in rows}) == 1
    if rows[0].source.device.type == "cpu" or not alike or len(rows) == 1:
        return [factors(r, ridge, dtype) for r in rows]
    batch = Rows(*(torch.stack(tensors) for tensors in zip(*rows, strict=True)))
    if not bool((batch.source != batch.destination).any(2).all()):
        return [factors(r, ridge, dtype) for r in rows]
    left, right = factors(batch, ridge, dtype)
    return [(a, None if right is None else right[i]) for i, a in enumerate(left)]


def update_(weights: Sequence[Tensor], found: Factors | Sequence[Factors]) -> None:
    """Applies the factors, one for all weights or one for each, in place."""
    every = [found] * len(weights) if isinstance(found, tuple) else list(found)
    for weight, (left, right) in zip(weights, every, strict=True):
        whole = weight.device.type != "cpu"
        size = len(weight) if whole else max(64, _BLOCK // weight.shape[1])
        for block in weight.split(size):
            wide = block.to(left.dtype)
            if right is None:
                wide.add_(wide @ left)
            else:
                wide.addmm_(wide @ left, right)
            if wide is not block:
                block.copy_(wide)


def edit(weights: Sequence[Tensor], rows: Rows | Sequence[Rows], ridge: float) -> list[Tensor]:
    """The weights, edited in place."""
    weights = list(weights)
    dtype = torch.promote_types(weights[0].dtype, torch.float32)
    if isinstance(rows, Rows):
        update_(weights, factors(rows, ridge, dtype))
    else:
        update_(weights, factors_of_layers(for_each(rows, len(weights)), ridge, dtype))
    return weights
