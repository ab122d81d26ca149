"""The field's closed-form edits, written here from the published mathematics, with one interface.

Every edit takes weights `[o_i, d]`, rows (one set for all weights or one for each) and a ridge, and
answers the list of edited weights. All solve the same problem as `realera_fast.solver.fit_values`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Rows(NamedTuple):
    """Weighted rows: the edit sends each source to its destination."""

    source: Tensor
    """`[n, d]`"""
    destination: Tensor
    """`[n, d]`, equal to ``source`` where a row is to keep its place."""
    weight: Tensor
    """`[n]`"""


def for_each(rows: Rows | Sequence[Rows], count: int) -> list[Rows]:
    """One set of rows for each of ``count`` weights."""
    return [rows] * count if isinstance(rows, Rows) else list(rows)


def working_dtype(weight: Tensor) -> torch.dtype:
    """What the published codes compute in: float32 (float64 for the tests' float64 weights)."""
    return torch.promote_types(weight.dtype, torch.float32)
