"""Small timed cases; `pytest --benchmark-only tests/bench/test_benchmarks.py` compares them.

Published numbers come from bench/run.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from baselines import Rows, low_rank
from tolerance import check, product_error
from torch import Tensor

from realera_fast import ops
from realera_fast.solver import NormalEquations, Pairs

WIDTH = 128
RIDGE = 0.5
COUNTS = pytest.mark.parametrize("count", [4, 512], ids=["few", "many"])


def rows_of(count: int) -> Rows:
    x, y = (torch.nn.functional.normalize(torch.randn(count, WIDTH)) * 28 for _ in range(2))
    return Rows(x, y, torch.ones(count))


def random_weights() -> list[Tensor]:
    return [0.02 * torch.randn(height, WIDTH) for height in (64, 96, 128)]


def accumulated(rows: Rows) -> NormalEquations:
    return NormalEquations(WIDTH).update(Pairs(*rows))


def library(weights: list[Tensor], rows: Rows) -> list[Tensor]:
    found = accumulated(rows).solve(ridge=RIDGE, rank_tolerance=0.0).map
    ops.low_rank_update_(weights, found.left, found.right)
    return weights


@COUNTS
@pytest.mark.benchmark(group="accumulate")
def test_accumulate(benchmark: Any, count: int) -> None:
    rows = rows_of(count)
    assert benchmark(accumulated, rows).rows == count


@COUNTS
@pytest.mark.benchmark(group="solve")
def test_solve(benchmark: Any, count: int) -> None:
    equations = accumulated(rows_of(count))
    found = benchmark(equations.solve, ridge=RIDGE, rank_tolerance=0.0)
    assert found.info.residual_ratio < 30


@COUNTS
@pytest.mark.benchmark(group="update")
def test_update(benchmark: Any, count: int) -> None:
    found = accumulated(rows_of(count)).solve(ridge=RIDGE, rank_tolerance=0.0).map
    weights = random_weights()
    benchmark(ops.low_rank_update_, weights, found.left, found.right)
    assert all(weight.isfinite().all() for weight in weights)


@COUNTS
@pytest.mark.parametrize("edit", ["library", "composition"])
@pytest.mark.benchmark(group="closed form")
def test_closed_form(benchmark: Any, edit: str, count: int) -> None:
    rows, weights = rows_of(count), random_weights()
    run = library if edit == "library" else lambda w, r: low_rank.edit(w, r, RIDGE)

    def fresh() -> tuple[tuple[list[Tensor], Rows], dict[str, Any]]:
        return ([weight.clone() for weight in weights], rows), {}

    edited = benchmark.pedantic(run, setup=fresh, rounds=10)
    wide = [weight.to(torch.float64) for weight in weights]
    expected = low_rank.edit([w.clone() for w in wide], rows, RIDGE)
    plain = low_rank.edit([w.clone() for w in weights], rows, RIDGE)
    factors = [part for part in low_rank.factors(rows, RIDGE) if part is not None]
    for i, (weight, after) in enumerate(zip(weights, edited, strict=True)):
        floor = product_error(weight, *factors)
        check(f"weight {i}", after, expected[i], plain[i], floor=floor)


@pytest.mark.benchmark(group="perturb")
def test_perturb(benchmark: Any) -> None:
    embeddings = torch.randn(2, 9, WIDTH)

    def drawn() -> Tensor:
        alpha, _, scale = ops.perturb(embeddings, 4, 0.5, 0.9, 1.6, 7)
        return ops.perturb_rows(embeddings, alpha, scale, 7)

    assert benchmark(drawn).shape == (2, 4, 9, WIDTH)


@pytest.mark.benchmark(group="perturb")
def test_perturb_project(benchmark: Any) -> None:
    embeddings = torch.randn(2, 9, WIDTH)
    alpha, _, scale = ops.perturb(embeddings, 4, 0.5, 0.9, 1.6, 7)
    weight = torch.cat(random_weights())
    y = benchmark(ops.perturb_project, embeddings, alpha, scale, weight, 7)
    assert y.shape == (2, 4, 9, len(weight))
