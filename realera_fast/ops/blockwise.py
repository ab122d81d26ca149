"""Operations over many perturbed rows that never hold more than a block of them.

Written once, of operations that each device implements (`perturb_rows`, `gram_`, `project_into`).
Fusing the drawing of rows into the products was weighed and does not pay: the products need every
row many times (once for each tile of 128 to 256 output columns), drawing an element again costs
more than its share of the products on tensor cores, and a block stays in the cache, where writing
and reading it once costs a few percent of them (`bench/NOTES.md`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from realera_fast.ops.perturb_reference import exact_dtype

_BLOCK_BYTES = {"cuda": 32 << 20}
"""Rows held at once: they stay in the L2 cache of a large GPU, and fill it with work."""
_BLOCK_BYTES_ELSEWHERE = 4 << 20


def _blocks(embeddings: Tensor, samples: int, element_size: int) -> Iterator[tuple[slice, slice]]:
    """Concepts and samples whose rows make one block: contiguous in `[c, s, t, d]`."""
    concepts, tokens, width = embeddings.shape
    most = _BLOCK_BYTES.get(embeddings.device.type, _BLOCK_BYTES_ELSEWHERE)
    prompts = max(1, most // max(1, tokens * width * element_size))
    if samples == 0:
        return
    if prompts >= samples:
        step = prompts // samples
        for start in range(0, concepts, step):
            yield slice(start, min(start + step, concepts)), slice(0, samples)
        return
    for concept in range(concepts):
        for start in range(0, samples, prompts):
            yield slice(concept, concept + 1), slice(start, min(start + prompts, samples))


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
    """`reference.perturb_project`, block by block."""
    concepts, tokens, _ = embeddings.shape
    samples = alpha.shape[1]
    y = embeddings.new_empty((concepts, samples, tokens, len(weight)))
    for c, s in _blocks(embeddings, samples, embeddings.element_size()):
        rows = torch.ops.realera_fast.perturb_rows(
            embeddings[c],
            alpha[c, s],
            scale[c, s],
            seed,
            offset + s.start,
            concept_offset + c.start,
        )
        torch.ops.realera_fast.project_into(
            y[c, s].flatten(0, 2), rows.flatten(0, 2), weight, down, up, heights, scaling
        )
    return y


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
    """`reference.perturb_project_backward`, block by block: rows are drawn again, not kept."""
    exact = exact_dtype(embeddings.dtype)
    grad_down = torch.zeros(down.shape, dtype=exact, device=down.device)
    grad_up = torch.zeros(up.shape, dtype=exact, device=up.device)
    for c, s in _blocks(embeddings, alpha.shape[1], embeddings.element_size()):
        rows = torch.ops.realera_fast.perturb_rows(
            embeddings[c],
            alpha[c, s],
            scale[c, s],
            seed,
            offset + s.start,
            concept_offset + c.start,
        )
        part = torch.ops.realera_fast.project_backward(
            grad[c, s].flatten(0, 2), rows.flatten(0, 2), down, up, heights, scaling
        )
        grad_down += part[0]
        grad_up += part[1]
    return grad_down, grad_up


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
    """`reference.perturb_accumulate_`, block by block.

    All samples of a token share its destination a, so sum_s (a - x_s) x_s^T is a (sum_s x_s)^T
    minus what enters the Gram matrix: beside that, one row for each token.
    """
    exact = exact_dtype(embeddings.dtype)
    own = torch.zeros_like(gram)
    for c, s in _blocks(embeddings, alpha.shape[1], exact.itemsize):
        rows = torch.ops.realera_fast.perturb_rows(
            embeddings[c].to(exact),
            alpha[c, s],
            scale[c, s],
            seed,
            offset + s.start,
            concept_offset + c.start,
        )
        w = weight[c, None].expand(rows.shape[:3])
        x, w_rows = rows.flatten(0, 2), w.flatten()
        if x.device.type == "cpu" and not bool((weight[c] != 0).all()):
            used = w_rows != 0
            x, w_rows = x[used], w_rows[used]
        torch.ops.realera_fast.gram_(own, x, w_rows)
        if destination is not None:
            total = rows.sum(1, dtype=torch.float64) * weight[c, :, None]
            moved = destination[c].to(torch.float64)
            # What has no weight has no part, even if it is not finite.
            moved = torch.where(weight[c, :, None] != 0, moved, 0.0).flatten(0, 1)
            cross.addmm_(moved.mT, total.flatten(0, 1))
    gram += own
    if destination is not None and not relative:
        cross -= own


def project(
    x: Tensor,
    weight: Tensor,
    down: Tensor | None,
    up: Tensor | None,
    heights: Sequence[int],
    scaling: float,
) -> Tensor:
    """`reference.project`, of `project_into`."""
    y = x.new_empty((len(x), len(weight)))
    torch.ops.realera_fast.project_into(y, x, weight, down, up, heights, scaling)
    return y


def project_into(
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    down: Tensor | None,
    up: Tensor | None,
    heights: Sequence[int],
    scaling: float,
) -> None:
    """Writes `reference.project` into `y`, of library calls: one product for all base weights."""
    torch.mm(x, weight.mT, out=y)
    if down is None or up is None or down.shape[1] == 0:
        return
    rank = down.shape[1]
    hidden = x @ down.to(x.dtype).flatten(0, 1).mT
    up = up.to(x.dtype)
    start = 0
    for layer, height in enumerate(heights):
        part = slice(start, start + height)
        y[:, part].addmm_(hidden[:, layer * rank : (layer + 1) * rank], up[part].mT, alpha=scaling)
        start += height


def project_backward(
    grad: Tensor, x: Tensor, down: Tensor, up: Tensor, heights: Sequence[int], scaling: float
) -> tuple[Tensor, Tensor]:
    """`reference.project_backward`, of library calls: the factors of all layers in two products."""
    exact = exact_dtype(x.dtype)
    layers, rank, width = down.shape
    hidden = x @ down.to(x.dtype).flatten(0, 1).mT
    grad_hidden = torch.empty_like(hidden)
    grad_up = torch.empty(up.shape, dtype=exact, device=x.device)
    up = up.to(x.dtype)
    start = 0
    for layer, height in enumerate(heights):
        part, ranks = slice(start, start + height), slice(layer * rank, (layer + 1) * rank)
        grad_up[part] = grad[:, part].mT @ hidden[:, ranks]
        grad_hidden[:, ranks] = grad[:, part] @ up[part]
        start += height
    grad_down = (grad_hidden.mT @ x).to(exact)
    return grad_down.view(layers, rank, width).mul_(scaling), grad_up.mul_(scaling)
