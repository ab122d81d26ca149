"""Outputs of a layer are moved as the least squares say, whatever the scale of what stays."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from realera_fast.solver import NAMED_WEIGHT, ValueSystem

F64 = torch.float64


def problem(o=5, d=9, n=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight, rows, named, goals = (
        torch.randn(*shape, dtype=F64, generator=generator)
        for shape in ((o, d), (40, d), (n, d), (n, d))
    )
    return weight, rows.mT @ rows, named, goals


def move_values(weight, moment, named, goals, *, ridge, weights=None):
    weights = torch.full((len(named),), NAMED_WEIGHT) if weights is None else weights
    return (
        ValueSystem(weight, moment, named)
        .held_by(ridge)
        .factors(goals, weights, rank_tolerance=1e-9)
    )


def minimiser(weight, moment, named, goals, ridge, weights=None):
    """R W of the objective, from its normal equations as they are written."""
    eye = torch.eye(len(weight), dtype=F64)
    held = weight @ moment @ weight.mT
    held = held / held.diagonal().mean() + ridge * eye
    outputs = weight @ named.mT
    size = outputs.norm(dim=0).mean()
    each = torch.full((len(named),), NAMED_WEIGHT) if weights is None else weights
    outputs, aims = outputs / size, weight @ goals.mT / size
    system = held + (outputs * each) @ outputs.mT
    cross = ((aims - outputs) * each) @ outputs.mT
    return (eye + torch.linalg.solve(system, cross, left=False)) @ weight


@pytest.mark.parametrize(("o", "n"), [(5, 1), (5, 2), (9, 3), (12, 1), (3, 4)])
@pytest.mark.parametrize("ridge", [0.1, 1.0, 30.0])
def test_it_is_the_minimiser(o, n, ridge):
    weight, moment, named, goals = problem(o, 9, n)
    up, down = move_values(weight, moment, named, goals, ridge=ridge)
    assert up.shape == (o, min(o, n)) and down.shape == (min(o, n), 9)
    assert up.dtype == down.dtype == torch.float32
    wanted = minimiser(weight, moment, named, goals, ridge)
    assert_close(weight + up.double() @ down.double(), wanted, rtol=1e-4, atol=1e-4)


def test_words_of_different_weight_and_how_rows_follow():
    weight, moment, words, goals = problem(n=4)
    weights = torch.tensor([NAMED_WEIGHT, 1.0, 0.1, 0.0], dtype=F64)
    system = ValueSystem(weight, moment, words).held_by(1.0)
    rows = torch.randn(6, 9, dtype=F64, generator=torch.Generator().manual_seed(7))
    answers = system.moves(system.answers(rows), weights)
    wanted = minimiser(weight, moment, words, goals, 1.0, weights)
    # A word of no weight does not move anything, whatever its goal is.
    assert not answers[3].any()
    moved = ((goals - words) @ weight.mT).mT @ answers
    assert_close(moved, (wanted - weight) @ rows.mT)
    up, down = move_values(weight, moment, words, goals, ridge=1.0, weights=weights)
    assert_close(weight + up.double() @ down.double(), wanted, rtol=1e-4, atol=1e-4)


def test_named_words_arrive_and_a_great_ridge_asks_the_layer_alone():
    """Without a word of what stays, what moves is the outputs' share of the named word's own."""
    weight, moment, named, goals = problem(n=1)
    for ridge in (0.01, 1.0):
        up, down = move_values(weight, moment, named, goals, ridge=ridge)
        edited = weight + up.double() @ down.double()
        assert_close(edited @ named[0], weight @ goals[0], rtol=1e-2, atol=1e-2)
    up, down = move_values(weight, moment, named, goals, ridge=100.0)
    outputs = weight @ named.mT
    alone = outputs.mT @ weight
    assert abs(float(torch.nn.functional.cosine_similarity(down.double(), alone))) > 0.999


def test_the_scale_of_what_stays_does_not_count():
    weight, moment, named, goals = problem()
    one = move_values(weight, moment, named, goals, ridge=1.0)
    other = move_values(weight, 1e6 * moment, named, goals, ridge=1.0)
    assert_close(one[0] @ one[1], other[0] @ other[1])


def test_nothing_that_stays_and_nobody_who_goes():
    weight, moment, named, goals = problem()
    up, down = move_values(weight, torch.zeros_like(moment), named, goals, ridge=1.0)
    assert up.isfinite().all() and down.isfinite().all()
    up, down = move_values(weight, moment, named[:0], goals[:0], ridge=1.0)
    assert up.shape == (5, 0) and down.shape == (0, 9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_weights_of_any_dtype(dtype):
    weight, moment, named, goals = problem()
    up, down = move_values(weight.to(dtype), moment, named, goals, ridge=1.0)
    wanted = minimiser(weight.to(dtype).double(), moment, named, goals, 1.0)
    assert_close(
        weight.to(dtype).double() + up.double() @ down.double(), wanted, rtol=1e-4, atol=1e-4
    )


def test_refusals():
    weight, moment, named, goals = problem()
    with pytest.raises(ValueError, match=r"goals: expected \[1, 9\]"):
        move_values(weight, moment, named[:1], goals, ridge=1.0)
    with pytest.raises(ValueError, match=r"words: expected \[n, 9\]"):
        move_values(weight, moment, named[:, 1:], goals, ridge=1.0)
    with pytest.raises(ValueError, match=r"moment: expected \[9, 9\]"):
        move_values(weight, moment[:3], named, goals, ridge=1.0)
    for ridge in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="value_ridge"):
            move_values(weight, moment, named, goals, ridge=ridge)
