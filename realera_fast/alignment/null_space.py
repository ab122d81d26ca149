"""Down-projections that what stays does not pass: preservation by construction."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_RIDGE = 1e-3
"""Of the mean second moment of what stays: directions that it hardly has are taken alike."""

_NOTHING = 1e-9
"""So much less of the words than the first row is rounding."""


def null_space_down(staying: Tensor, leaving: Tensor, r: int) -> Tensor:
    """Rows that pass the named words and next to nothing of what stays (after SuPLoRA, arXiv
    2601.03305, whose rows span the null space of a few words; that of a vocabulary is empty).

    They maximize w' C w / w' (G + ridge) w, one after the other: generalized eigenvectors.

    Args:
        staying: `[d, d]` second moments G of what stays.
        leaving: `[d, d]` second moments C of the named words.
        r: how many rows.

    Returns:
        `[r, d]` float32, on the CPU. What the named words leave in a row is as much as in a row
        drawn as peft draws it, so that steps are as long. Rows that the words have no direction for
        are zero.

    Raises:
        ValueError: r is more than d.
    """
    g, c = (moments.detach().to("cpu", torch.float64) for moments in (staying, leaving))
    d = len(g)
    if r > d:
        raise ValueError(f"AlignmentConfig.r: expected at most the text's {d} features, got {r}")
    ridge = _RIDGE * (float(g.diagonal().mean()) or 1.0)
    root = torch.linalg.cholesky(g + ridge * torch.eye(d, dtype=g.dtype))
    whitened = torch.linalg.solve_triangular(root, c, upper=False)
    whitened = torch.linalg.solve_triangular(root, whitened.mT, upper=False)
    found = torch.linalg.eigh((whitened + whitened.mT) / 2)
    shares = found.eigenvalues[-r:].flip(0)
    vectors = found.eigenvectors[:, -r:].flip(1)
    rows = torch.linalg.solve_triangular(root.mT, vectors, upper=True).mT
    rows = rows / rows.norm(dim=1, keepdim=True)
    # Entries of peft's rows are uniform in +-1/sqrt(d).
    drawn, passed = c.diagonal().mean() / 3.0, ((rows @ c) * rows).sum(1)
    length = (drawn / passed.clamp_min(1e-300)).sqrt().clamp_max(1.0 / math.sqrt(3.0))
    # Of fewer words than rows the last directions are arbitrary.
    length = torch.where(shares > _NOTHING * shares[0], length, 0.0)
    return (rows * length[:, None]).float()
