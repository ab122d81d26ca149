"""The baselines of the benchmark answer the same problem as the library."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from baselines import Rows, batched, low_rank, mace, uce
from torch import Tensor

from realera_fast import ops
from realera_fast.solver import NormalEquations, Pairs

EDITS = {
    "uce": uce.edit,
    "mace": mace.edit,
    "batched": batched.edit,
    "low_rank": low_rank.edit,
}
HEIGHTS = (5, 16, 5)


def rows_of(moved: int, preserved: int, width: int, dtype: torch.dtype = torch.float64) -> Rows:
    source = torch.randn(moved + preserved, width, dtype=torch.float64)
    destination = source.clone()
    destination[:moved] = torch.randn(moved, width, dtype=torch.float64)
    weight = torch.rand(moved + preserved, dtype=torch.float64) + 0.5
    return Rows(source.to(dtype), destination.to(dtype), weight)


def library(weights: list[Tensor], rows: Rows | list[Rows], ridge: float) -> list[Tensor]:
    edited = [weight.clone() for weight in weights]
    every = rows if isinstance(rows, list) else [rows] * len(weights)
    for weight, own in zip(edited, every, strict=True):
        equations = NormalEquations(weight.shape[1]).update(Pairs(*own))
        found = equations.solve(ridge=ridge, rank_tolerance=0.0, dtype=torch.float64).map
        ops.low_rank_update_([weight], found.left, found.right)
    return edited


def assert_agrees(
    edit: Callable[..., list[Tensor]], weights: list[Tensor], rows: Rows | list[Rows]
) -> None:
    expected = library(weights, rows, 0.3)
    got = edit([weight.clone() for weight in weights], rows, 0.3)
    for before, after, reference in zip(weights, got, expected, strict=True):
        scale = (reference - before).abs().max()
        assert (after - reference).abs().max() <= 1e-9 * scale


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
@pytest.mark.parametrize(
    ("moved", "preserved"), [(1, 0), (3, 0), (3, 20), (9, 0), (9, 30), (11, 2), (80, 0), (80, 7)]
)
def test_agrees_with_the_library(
    edit: Callable[..., list[Tensor]], moved: int, preserved: int
) -> None:
    weights = [torch.randn(height, 12, dtype=torch.float64) for height in HEIGHTS]
    assert_agrees(edit, weights, rows_of(moved, preserved, 12))


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_each_layer_may_have_rows_of_its_own(edit: Callable[..., list[Tensor]]) -> None:
    weights = [torch.randn(12, 12, dtype=torch.float64) for _ in range(3)]
    assert_agrees(edit, weights, [rows_of(n, n - 2, 12) for n in (2, 7, 30)])


def test_systems_in_one_batch_are_the_systems_alone() -> None:
    # The batch is what a GPU runs; its arithmetic needs none.
    for moved in (2, 9, 40):
        alone = [rows_of(moved, 0, 12) for _ in range(3)]
        batch = Rows(*(torch.stack(tensors) for tensors in zip(*alone, strict=True)))
        left, right = low_rank.factors(batch, 0.3, torch.float64)
        for i, own in enumerate(alone):
            expected = low_rank.factors(own, 0.3, torch.float64)
            torch.testing.assert_close(left[i], expected[0])
            assert (right is None) == (expected[1] is None)
            if right is not None:
                torch.testing.assert_close(right[i], expected[1])


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("moved", [3, 11, 60])
def test_dtypes(edit: Callable[..., list[Tensor]], dtype: torch.dtype, moved: int) -> None:
    rows = rows_of(moved, 4, 12, dtype)
    weights = [torch.randn(height, 12).to(dtype) for height in HEIGHTS]
    wide = [weight.to(torch.float64) for weight in weights]
    expected = library(wide, Rows(*(tensor.to(torch.float64) for tensor in rows)), 0.3)
    got = edit([weight.clone() for weight in weights], rows, 0.3)
    for after, reference in zip(got, expected, strict=True):
        assert after.dtype == dtype
        limit = 50 * torch.finfo(dtype).eps * reference.abs().max()
        assert (after.to(torch.float64) - reference).abs().max() <= limit
