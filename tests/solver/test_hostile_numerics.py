"""Rows, weights and sizes that break a careless closed form, against extended precision."""

from __future__ import annotations

import logging
import math

import numpy as np
import pytest
import torch
from tolerance import check, product_error
from torch import Tensor

from realera_fast import ops
from realera_fast.solver import ConceptMap, NormalEquations, Pairs, SingularSystemError, Solution

F64 = torch.float64
EPS = torch.finfo(F64).eps
LOW = [torch.float32, torch.bfloat16, torch.float16]


def wide(tensor: Tensor) -> np.ndarray:
    """The same numbers in extended precision."""
    return tensor.detach().cpu().double().numpy().astype(np.longdouble)


def rounded(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array.astype(np.float64))


def divided(rhs: np.ndarray, gram: np.ndarray) -> np.ndarray:
    """``rhs gram^-1`` for a symmetric positive definite ``gram``, by elimination."""
    left, right = gram.copy(), rhs.T.copy()
    for i in range(len(left)):
        factor = left[i + 1 :, i, None] / left[i, i]
        right[i + 1 :] -= factor * right[i]
        left[i + 1 :] -= factor * left[i]
    for i in reversed(range(len(left))):
        right[i] = (right[i] - left[i, i + 1 :] @ right[i + 1 :]) / left[i, i]
    return right.T


def exact(pairs: Pairs, ridge: float) -> tuple[np.ndarray, np.ndarray]:
    """A with its ridge, and D, in extended precision from the rows themselves."""
    x, y, w = wide(pairs.source), wide(pairs.destination), wide(pairs.weight)[:, None]
    return x.T @ (w * x) + ridge * np.eye(x.shape[1], dtype=np.longdouble), (w * (y - x)).T @ x


def norm(array: np.ndarray) -> float:
    """Infinity norm."""
    return float(np.abs(array).sum(1).max())


def residual(concept_map: ConceptMap, gram: np.ndarray, cross: np.ndarray) -> float:
    """LAPACK's residual ratio of the map itself, not the one that the solver says it has."""
    update = wide(concept_map.left) @ wide(concept_map.right)
    return norm(update @ gram - cross) / (norm(gram) * norm(update) * EPS * len(gram))


def condition(gram: np.ndarray) -> float:
    """1-norm condition number."""
    return norm(gram) * norm(divided(np.eye(len(gram), dtype=np.longdouble), gram))


def rows_for(n: int, d: int, dtype: torch.dtype = F64, spread: float = 1.0) -> Pairs:
    """Rows with singular values from 1 down to ``1 / spread``; every third moves."""
    if spread == 1.0:
        source = torch.randn(n, d, dtype=F64)
    else:
        u, _ = torch.linalg.qr(torch.randn(n, d, dtype=F64))
        v, _ = torch.linalg.qr(torch.randn(d, d, dtype=F64))
        source = (u * torch.logspace(0, -math.log10(spread), d, dtype=F64)) @ v
    source = source.to(dtype)
    destination = source.clone()
    shift = torch.randn(len(source[::3]), d, dtype=F64) * source.double().square().mean().sqrt()
    destination[::3] += shift.to(dtype)
    return Pairs(source, destination, torch.rand(n, dtype=F64) + 0.5)


def part(pairs: Pairs, index: Tensor | slice) -> Pairs:
    return Pairs(pairs.source[index], pairs.destination[index], pairs.weight[index])


def joined(*parts: Pairs) -> Pairs:
    return Pairs(
        torch.cat([p.source for p in parts]),
        torch.cat([p.destination for p in parts]),
        torch.cat([p.weight for p in parts]),
    )


def accumulated(*parts: Pairs, device: torch.device | str = "cpu") -> NormalEquations:
    equations = NormalEquations(parts[0].source.shape[1], device=device)
    for pairs in parts:
        equations.update(pairs)
    return equations


def solved(equations: NormalEquations, ridge: float) -> Solution:
    """The map in float64 without a rank cut."""
    return equations.solve(ridge=ridge, rank_tolerance=0.0, dtype=F64)


def check_map(solution: Solution, pairs: Pairs, ridge: float) -> None:
    """Fails where a map is not as close to the exact one as a stable solver in float64 gets."""
    gram, cross = exact(pairs, ridge)
    update = divided(cross, gram)
    concept_map = solution.map.to("cpu")
    got = wide(concept_map.left) @ wide(concept_map.right)
    limit = 4 * len(gram) * EPS * condition(gram) * norm(update)
    assert norm(got - update) <= limit, f"error {norm(got - update):.3g}, limit {limit:.3g}"
    if cross.any():
        assert residual(concept_map, gram, cross) < 30
        assert 0 <= solution.info.residual_ratio < 30


class TestRows:
    @pytest.mark.parametrize(
        ("n", "d"),
        [
            (0, 1),
            (0, 6),
            (1, 1),
            (5, 1),
            (1, 9),
            (9, 9),
            (10, 9),
            (2000, 9),
            (33, 64),
            (64, 64),
            (65, 64),
            (3, 257),
        ],
        ids=str,
    )
    @pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
    @pytest.mark.parametrize("ridge", [1e-3, 50.0])
    def test_sizes(
        self, n: int, d: int, dtype: torch.dtype, ridge: float, device: torch.device
    ) -> None:
        pairs = rows_for(n, d, dtype)
        solution = solved(accumulated(pairs, device=device), ridge)
        check_map(solution, pairs, ridge)
        assert solution.info.rows == n
        # More directions than rows that move can only be rounding, and the usual cut removes that.
        moved = len(pairs.source[::3])
        cut = accumulated(pairs, device=device).solve(ridge=ridge, dtype=F64)
        assert cut.map.rank == cut.info.rank == min(moved, d)

    def test_one_row(self, device: torch.device) -> None:
        pairs = rows_for(1, 31)
        x, y, w, ridge = pairs.source[0], pairs.destination[0], float(pairs.weight), 0.25
        expected = torch.eye(31, dtype=F64) + torch.outer(y - x, x) * w / (w * x @ x + ridge)
        got = solved(accumulated(pairs, device=device), ridge).map.to("cpu").matrix
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-13)

    @pytest.mark.parametrize("n", [20, 60])
    def test_rank_deficient(self, n: int, device: torch.device) -> None:
        # 5 dimensions of 24, with fewer rows than dimensions and with more.
        basis = torch.randn(5, 24, dtype=F64)
        x = torch.randn(n, 5, dtype=F64) @ basis
        pairs = Pairs(x, x + torch.randn(n, 24, dtype=F64), torch.rand(n, dtype=F64))
        solution = solved(accumulated(pairs, device=device), 1e-2)
        check_map(solution, pairs, 1e-2)
        # What no row spans must stay where it is.
        outside = torch.linalg.svd(basis).Vh[5:]
        moved = solution.map.to("cpu")(outside)
        torch.testing.assert_close(moved, outside, rtol=0, atol=1e-10)

    def test_repeated_rows_are_weights(self, device: torch.device) -> None:
        pairs = rows_for(12, 16)
        times = torch.arange(12) % 4 + 1
        again = part(pairs, torch.repeat_interleave(torch.arange(12), times))
        heavier = Pairs(pairs.source, pairs.destination, pairs.weight * times)
        got, expected = (
            solved(accumulated(p, device=device), 0.1).map.to("cpu").matrix
            for p in (again, heavier)
        )
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
        plain = solved(accumulated(pairs, device=device), 0.1).map.to("cpu").matrix
        assert (plain - expected).abs().max() > 1e-3

    def test_a_concept_sent_to_two_places(self, device: torch.device) -> None:
        x = torch.randn(1, 16, dtype=F64).expand(2, 16)
        y = torch.randn(2, 16, dtype=F64)
        pairs = Pairs(x, y, torch.tensor([1.0, 3.0]))
        moved = solved(accumulated(pairs, device=device), 1e-9).map.to("cpu")(x[:1])
        torch.testing.assert_close(moved[0], (y[0] + 3 * y[1]) / 4, rtol=0, atol=1e-8)

    @pytest.mark.parametrize("n", [20, 60])
    def test_weights_of_sixteen_orders_of_magnitude(self, n: int, device: torch.device) -> None:
        pairs = rows_for(n, 40)
        pairs = Pairs(pairs.source, pairs.destination, torch.logspace(8, -8, n, dtype=F64))
        solution = solved(accumulated(pairs, device=device), 1e-3)
        check_map(solution, pairs, 1e-3)
        # The heaviest rows hold their places as if the light ones weren't there.
        heavy = part(pairs, slice(0, 5))
        moved = solution.map.to("cpu")(heavy.source)
        assert (moved - heavy.destination).abs().max() < 1e-6

    @pytest.mark.parametrize("n", [7, 40])
    @pytest.mark.parametrize("power", [-66, 66])
    @pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
    def test_scale(self, n: int, power: int, dtype: torch.dtype, device: torch.device) -> None:
        # 2^66 is 7e19, and its square is beyond float32: the sums must not be there. A power of
        # two scales rows without rounding, so that both systems are the same one.
        pairs, scale = rows_for(n, 24, dtype), 2.0**power
        scaled = Pairs(pairs.source * scale, pairs.destination * scale, pairs.weight)
        expected = solved(accumulated(pairs, device=device), 0.1).map.to("cpu").matrix
        solution = solved(accumulated(scaled, device=device), 0.1 * scale**2)
        torch.testing.assert_close(solution.map.to("cpu").matrix, expected, rtol=0, atol=1e-12)
        assert solution.info.residual_ratio < 30
        assert (expected - torch.eye(24, dtype=F64)).abs().max() > 1e-2

    def test_scale_of_the_weights(self, device: torch.device) -> None:
        pairs = rows_for(30, 24)
        expected = solved(accumulated(pairs, device=device), 0.1).map.to("cpu").matrix
        for scale in (1e-20, 1e20):
            scaled = Pairs(pairs.source, pairs.destination, pairs.weight * scale)
            got = solved(accumulated(scaled, device=device), 0.1 * scale).map.to("cpu").matrix
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)

    @pytest.mark.parametrize("n", [11, 200])
    def test_order_and_batches(self, n: int, device: torch.device) -> None:
        pairs = rows_for(n, 30)
        expected = solved(accumulated(pairs, device=device), 0.1)
        check_map(expected, pairs, 0.1)
        shuffled = part(pairs, torch.randperm(n))
        for size in (1, 4, n):
            pieces = [part(shuffled, slice(i, i + size)) for i in range(0, n, size)]
            got = solved(accumulated(*pieces, device=device), 0.1)
            assert got.info.rows == n
            torch.testing.assert_close(
                got.map.to("cpu").matrix, expected.map.to("cpu").matrix, rtol=0, atol=1e-12
            )

    def test_batches_of_different_dtypes(self, device: torch.device) -> None:
        parts = [rows_for(4, 30, dtype) for dtype in (*LOW, F64)]
        exactly = joined(*(Pairs(p.source.to(F64), p.destination.to(F64), p.weight) for p in parts))
        check_map(solved(accumulated(*parts, device=device), 0.1), exactly, 0.1)

    @pytest.mark.parametrize("n", [5, 400])
    def test_repeats_bit_for_bit(self, n: int, device: torch.device) -> None:
        pairs = rows_for(n, 300, torch.float32)
        first, second = (accumulated(pairs, device=device).solve(ridge=0.1) for _ in range(2))
        assert torch.equal(first.map.left, second.map.left)
        assert torch.equal(first.map.right, second.map.right)
        assert first.info == second.info


class TestBookkeeping:
    """Few rows may be solved another way than many; both must be the same sums."""

    @pytest.mark.parametrize("n", [3, 90])
    def test_subtraction_undoes_addition(self, n: int, device: torch.device) -> None:
        pairs, others = rows_for(n, 32), rows_for(50, 32)
        a, b = accumulated(pairs, device=device), accumulated(others, device=device)
        both = a + b
        back = both - b
        assert back.rows == n
        for name in ("gram", "cross"):
            error = (getattr(back, name) - getattr(a, name)).abs()
            # A few roundings of numbers of the size of the sum.
            assert error.max() <= 8 * EPS * getattr(both, name).abs().max(), name
        torch.testing.assert_close(
            solved(back, 0.5).map.to("cpu").matrix,
            solved(a, 0.5).map.to("cpu").matrix,
            rtol=0,
            atol=1e-12,
        )
        check_map(solved(both, 0.5), joined(pairs, others), 0.5)

    def test_few_rows_and_moments(self, device: torch.device) -> None:
        pairs, kept = rows_for(3, 32), rows_for(100, 32)
        kept = Pairs(kept.source, kept.source.clone(), kept.weight)
        moment = kept.source.mT @ (kept.weight[:, None] * kept.source)
        for first in (True, False):
            equations = NormalEquations(32, device=device)
            if first:
                equations.update_moments(moment)
            equations.update(pairs)
            if not first:
                equations.update_moments(moment)
            check_map(solved(equations, 0.5), joined(pairs, kept), 0.5)

    def test_few_rows_and_moments_without_a_ridge(self, device: torch.device) -> None:
        # The moments may have no inverse where the sum with the rows has one.
        pairs, kept = rows_for(4, 32), rows_for(100, 32)
        for missing in (0, 3, 5):
            x = kept.source.clone()
            x[:, :missing] = 0
            moment = x.mT @ (kept.weight[:, None] * x)
            equations = NormalEquations(32, device=device).update(pairs).update_moments(moment)
            if missing > len(pairs.weight):
                with pytest.raises(SingularSystemError, match="positive ridge"):
                    solved(equations, 0.0)
                continue
            everything = joined(pairs, Pairs(x, x.clone(), kept.weight))
            check_map(solved(equations, 0.0), everything, 0.0)

    def test_few_rows_taken_away(self, device: torch.device) -> None:
        pairs = rows_for(9, 32)
        equations = accumulated(pairs, device=device)
        equations = equations - accumulated(part(pairs, slice(4, 9)), device=device)
        assert equations.rows == 4
        rest = part(pairs, slice(0, 4))
        expected = solved(accumulated(rest, device=device), 0.5).map.to("cpu").matrix
        got = solved(equations, 0.5).map.to("cpu").matrix
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)

    def test_goes_on_after_a_solve(self, device: torch.device) -> None:
        first, second = rows_for(4, 32), rows_for(5, 32)
        equations = accumulated(first, device=device)
        check_map(solved(equations, 0.5), first, 0.5)
        check_map(solved(equations, 2.0), first, 2.0)
        equations.update(second)
        check_map(solved(equations, 0.5), joined(first, second), 0.5)

    def test_changing_sums_or_rows_from_outside(self, device: torch.device) -> None:
        # Rows are free to change after `update`, and the sums are public: both must keep meaning
        # what they say, whatever the solver remembers.
        pairs = rows_for(4, 32)
        before = Pairs(pairs.source.clone(), pairs.destination.clone(), pairs.weight.clone())
        equations = accumulated(pairs, device=device)
        for field in (pairs.source, pairs.destination, pairs.weight):
            field.fill_(7)
        check_map(solved(equations, 0.5), before, 0.5)
        equations.gram.mul_(2)
        equations.cross.mul_(2)
        doubled = Pairs(before.source, before.destination, 2 * before.weight)
        check_map(solved(equations, 0.5), doubled, 0.5)

    def test_operands_of_a_sum_stay_apart(self, device: torch.device) -> None:
        first, second, third = rows_for(3, 32), rows_for(4, 32), rows_for(2, 32)
        a, b = accumulated(first, device=device), accumulated(second, device=device)
        total = a + b
        a.update(third)
        check_map(solved(total, 0.5), joined(first, second), 0.5)
        total.update(third)
        check_map(solved(a, 0.5), joined(first, third), 0.5)
        check_map(solved(b, 0.5), second, 0.5)


class TestCondition:
    @pytest.mark.parametrize("dtype", LOW, ids=str)
    @pytest.mark.parametrize("spread", [1e2, 1e4, 1e6])
    def test_edited_weights(self, spread: float, dtype: torch.dtype, device: torch.device) -> None:
        pairs, ridge = rows_for(96, 48, torch.float32, spread**0.5), 1e-9
        equations = accumulated(pairs, device=device)
        solution = equations.solve(ridge=ridge)
        assert solution.info.residual_ratio < 30
        gram, cross = exact(pairs, ridge)
        weight = torch.randn(37, 48).to(dtype)
        truth = wide(weight) + wide(weight) @ divided(cross, gram)
        # What PyTorch gets when everything stays in the dtype of the rows.
        x, w = pairs.source, pairs.weight.float()[:, None]
        gram32 = x.mT @ (w * x) + ridge * torch.eye(48)
        cross32 = (w * (pairs.destination - x)).mT @ x
        update = torch.linalg.solve(gram32, cross32.mT).mT
        plain = (weight.float() + weight.float() @ update).to(dtype)
        edited = weight.to(device)
        ops.low_rank_update_([edited], solution.map.left, solution.map.right)
        check("edited", edited.cpu(), rounded(truth), plain)

    @pytest.mark.parametrize("n", [12, 60])
    @pytest.mark.parametrize("true", [1e2, 1e6, 1e10, 1e14])
    def test_estimate(
        self, n: int, true: float, device: torch.device, caplog: pytest.LogCaptureFixture
    ) -> None:
        # The rows span 12 of 24 dimensions; the ridge alone holds the others.
        basis = torch.linalg.qr(torch.randn(24, 12, dtype=F64)).Q
        x = torch.randn(n, 12, dtype=F64) @ basis.mT
        pairs = Pairs(x, x + torch.randn(n, 24, dtype=F64), torch.ones(n))
        gram, _ = exact(pairs, 0.0)
        ridge = float(np.linalg.eigvalsh(gram.astype(np.float64))[-1]) / true
        with caplog.at_level(logging.WARNING):
            info = solved(accumulated(pairs, device=device), ridge).info
        known = condition(exact(pairs, ridge)[0])
        assert true / 2 < known < 100 * true, "the example is not what it should be"
        assert known / 10 < info.condition < 10 * known
        assert info.residual_ratio < 30
        if true <= 1e10:
            assert not caplog.text

    def test_estimate_is_of_rows_and_moments(self, device: torch.device) -> None:
        # The moments hold the first dimension almost not and the only row does: A is
        # well-conditioned, though what it was before the row isn't.
        row, kept = rows_for(1, 24), rows_for(200, 24)
        x = kept.source.clone()
        x[:, 0] = 0
        row.source[0, 0] = 10.0
        equations = NormalEquations(24, device=device).update(row)
        equations.update_moments(x.mT @ (kept.weight[:, None] * x))
        info = solved(equations, 1e-8).info
        known = condition(exact(joined(row, Pairs(x, x.clone(), kept.weight)), 1e-8)[0])
        assert known < 1e4, "the example is not what it should be"
        assert known / 10 < info.condition < 10 * known

    def test_a_tiny_ridge_beside_independent_rows(self, device: torch.device) -> None:
        # A is singular to working precision, and yet nothing is left open: rows of full rank go
        # where they should, the rest stays.
        x, y = torch.randn(12, 24, dtype=F64), torch.randn(12, 24, dtype=F64)
        solution = solved(accumulated(Pairs(x, y, torch.ones(12)), device=device), 1e-18)
        assert solution.info.condition > 1e15
        concept_map = solution.map.to("cpu")
        outside = torch.linalg.svd(x).Vh[12:]
        torch.testing.assert_close(concept_map(x), y, rtol=0, atol=1e-5)
        torch.testing.assert_close(concept_map(outside), outside, rtol=0, atol=1e-5)

    @pytest.mark.parametrize("n", [13, 60])
    def test_singular_to_working_precision(
        self, n: int, device: torch.device, caplog: pytest.LogCaptureFixture
    ) -> None:
        basis = torch.randn(12, 24, dtype=F64)
        x = torch.randn(n, 12, dtype=F64) @ basis
        y = torch.randn(n, 12, dtype=F64) @ basis
        pairs = Pairs(x, y, torch.ones(n))
        with caplog.at_level(logging.WARNING):
            solution = solved(accumulated(pairs, device=device), 1e-18)
        assert "singular to working precision" in caplog.text
        assert solution.info.condition > 1e15
        # Still the best that there is: rows go where least squares sends them.
        moved = solution.map.to("cpu")(x)
        assert moved.isfinite().all()
        best = x @ torch.linalg.lstsq(x, y, driver="gelsd").solution
        assert (moved - best).norm() < 1e-5 * best.norm()

    @pytest.mark.parametrize("n", [24, 25, 100])
    def test_ridge_zero_with_full_rank(self, n: int, device: torch.device) -> None:
        pairs = rows_for(n, 24)
        check_map(solved(accumulated(pairs, device=device), 0.0), pairs, 0.0)

    @pytest.mark.parametrize("n", [1, 23, 24, 100])
    def test_ridge_zero_with_too_few_dimensions(self, n: int, device: torch.device) -> None:
        pairs = rows_for(n, 24)
        flat = pairs.source.clone()
        # The last dimension is a sum of two others: full rank to a careless look.
        flat[:, 23] = flat[:, 0] + flat[:, 1]
        pairs = Pairs(flat, pairs.destination, pairs.weight)
        with pytest.raises(SingularSystemError, match=r"ridge is 0.*positive ridge.*preserve"):
            solved(accumulated(pairs, device=device), 0.0)


class TestBadValues:
    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize("field", ["source", "destination", "weight"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, F64], ids=str)
    def test_the_row_is_named_and_nothing_is_added(
        self, dtype: torch.dtype, field: str, bad: float, device: torch.device
    ) -> None:
        equations = accumulated(rows_for(6, 8), device=device)
        gram, cross = equations.gram.clone(), equations.cross.clone()
        expected = solved(equations, 0.1)
        pairs = rows_for(9, 8, dtype)
        # The first of two is the one to name.
        getattr(pairs, field)[3] = bad
        getattr(pairs, field)[5] = bad
        with pytest.raises(ValueError, match=r"row 3\b") as caught:
            equations.update(pairs)
        assert field in str(caught.value)
        assert torch.equal(equations.gram, gram) and torch.equal(equations.cross, cross)
        assert equations.rows == 6
        got = solved(equations, 0.1)
        assert torch.equal(got.map.left, expected.map.left)

    def test_one_bad_number_in_a_row_is_enough(self, device: torch.device) -> None:
        for column in (0, 6):
            pairs = rows_for(1000, 7, torch.float32)
            pairs.source[999, column] = math.nan
            with pytest.raises(ValueError, match=r"row 999\b"):
                accumulated(pairs, device=device)

    @pytest.mark.parametrize("weight", [-1e-3, -1e6])
    def test_negative_weight(self, weight: float, device: torch.device) -> None:
        # The smaller one leaves A positive definite: nothing later would notice.
        pairs = rows_for(20, 8)
        pairs.weight[3] = weight
        with pytest.raises(ValueError, match="weight"):
            solved(accumulated(pairs, device=device), 0.1)

    def test_weight_zero_is_no_row(self, device: torch.device) -> None:
        pairs = rows_for(20, 8)
        pairs.weight[6:] = 0
        got = solved(accumulated(pairs, device=device), 0.1).map.to("cpu").matrix
        rest = accumulated(part(pairs, slice(0, 6)), device=device)
        torch.testing.assert_close(got, solved(rest, 0.1).map.to("cpu").matrix, rtol=0, atol=1e-12)

    def test_squares_beyond_float64(self, device: torch.device) -> None:
        pairs = rows_for(20, 8)
        huge = Pairs(pairs.source * 1e200, pairs.destination * 1e200, pairs.weight)
        with pytest.raises(ValueError, match="infinity"):
            solved(accumulated(huge, device=device), 0.1)


class TestLowRankUpdate:
    @pytest.fixture
    def device(self, device_and_tiles: torch.device) -> torch.device:
        return device_and_tiles

    """The operation alone, at sizes that fit no tile and values at the ends of a dtype."""

    @pytest.mark.parametrize("dtype", [*LOW, F64], ids=str)
    @pytest.mark.parametrize("d", [1, 3, 17, 31, 65, 77])
    @pytest.mark.parametrize("offset", [False, True])
    def test_odd_heights(
        self, d: int, offset: bool, dtype: torch.dtype, device: torch.device
    ) -> None:
        # All weights in one buffer with a number between them, which must survive.
        heights = (1, 2, 3, 5, 7, 15, 16, 17, 33, 63, 127, 129, 255, 257)
        rank = (d + 1) // 2
        accumulate = F64 if dtype == F64 else torch.float32
        buffer = torch.full((sum(heights) * d + len(heights) + 1,), 9.0, device=device).to(dtype)
        weights, start = [], 1
        for o in heights:
            weights.append(buffer[start : start + o * d].view(o, d))
            start += o * d + 1
        left = torch.randn(d, rank, device=device).to(accumulate) / d
        right = torch.randn(rank, d, device=device).to(accumulate)
        values = [torch.randn(o, rank, device=device).to(accumulate) for o in heights]
        expected = []
        for w, v in zip(weights, values, strict=True):
            w.copy_(torch.randn(w.shape))
            thin = wide(w) @ wide(left)
            plain = w.to(accumulate) @ left
            factors = (w.to(accumulate), left, right)
            if offset:
                thin, plain = thin + wide(v), plain + v
                # W left + offset is the product of [W, offset] and left with the identity below.
                eye = torch.eye(rank, device=device)
                factors = (torch.cat((w, v), 1), torch.cat((left, eye)), right)
            expected.append(
                (
                    rounded(wide(w) + thin @ wide(right)),
                    (w.to(accumulate) + plain @ right).to(dtype).cpu(),
                    tuple(factor.clone() for factor in factors),
                )
            )
        ops.low_rank_update_(weights, left, right, values if offset else ())
        for i, (w, (truth, plain, factors)) in enumerate(zip(weights, expected, strict=True)):
            check(f"weights[{i}]", w.cpu(), truth, plain, floor=product_error(*factors))
        start = 0
        for o in heights:
            assert buffer[start] == 9, f"the number before the weight of height {o} changed"
            start += o * d + 1
        assert buffer[-1] == 9

    @pytest.mark.parametrize("dtype", [*LOW, F64], ids=str)
    def test_a_bad_row_stays_alone(self, dtype: torch.dtype, device: torch.device) -> None:
        left, right = torch.randn(33, 5, device=device), torch.randn(5, 33, device=device)
        weight = torch.randn(70, 33, device=device).to(dtype)
        clean = weight.clone()
        ops.low_rank_update_([clean], left, right)
        weight[11, 0], weight[64, 32] = math.nan, math.inf
        ops.low_rank_update_([weight], left, right)
        rest = [i for i in range(70) if i not in (11, 64)]
        assert torch.equal(weight[rest], clean[rest])
        assert weight[11].isnan().all() and not weight[64].isfinite().any()

    @pytest.mark.parametrize("dtype", LOW, ids=str)
    def test_ends_of_the_range(self, dtype: torch.dtype, device: torch.device) -> None:
        # One column, W + W * 1 = 2 W: exact in float32 but for what leaves the dtype.
        info = torch.finfo(dtype)
        least = info.smallest_normal * info.eps  # the smallest subnormal
        values = torch.tensor([least, 3 * least, info.smallest_normal, info.max, -info.max, -0.0])
        weight = values.to(dtype)[:, None].to(device)
        one = torch.ones(1, 1, device=device)
        if dtype is torch.float32:
            weight = weight[2:]  # float32 subnormals are the processor's affair
        expected = weight.clone() * 2
        ops.low_rank_update_([weight], one, one)
        assert torch.equal(weight, expected), f"{weight.tolist()}, expected {expected.tolist()}"
        assert weight.isinf().sum() == 2

    @pytest.mark.parametrize("k", [40, 200])
    def test_rank_above_the_width(self, k: int, device: torch.device) -> None:
        left, right = torch.randn(24, k, device=device) / k, torch.randn(k, 24, device=device)
        weight = torch.randn(9, 24, device=device)
        truth = wide(weight) + (wide(weight) @ wide(left)) @ wide(right)
        plain, factors = weight + (weight @ left) @ right, (weight.clone(), left, right)
        ops.low_rank_update_([weight], left, right)
        check("weight", weight.cpu(), rounded(truth), plain.cpu(), floor=product_error(*factors))


class TestSolveSpd:
    @pytest.fixture
    def device(self, device_and_tiles: torch.device) -> torch.device:
        return device_and_tiles

    def system(self, d: int, device: torch.device) -> tuple[Tensor, Tensor]:
        x = torch.randn(2 * d, d, dtype=F64)
        return (x.mT @ x + torch.eye(d, dtype=F64)).to(device), torch.randn(3, d, dtype=F64).to(
            device
        )

    @pytest.mark.parametrize("d", [1, 5, 64, 67])
    @pytest.mark.parametrize("batch", [1, 2, 7])
    def test_a_batch_is_its_systems(self, batch: int, d: int, device: torch.device) -> None:
        grams, rhs = zip(*(self.system(d, device) for _ in range(batch)), strict=True)
        # Scales far apart, so that a norm taken over the batch would show.
        scales = 10.0 ** torch.arange(batch)
        gram = torch.stack([g * s for g, s in zip(grams, scales, strict=True)])
        solution, info, reciprocal = ops.solve_spd(gram, torch.stack(rhs))
        assert solution.shape == (batch, 3, d) and not info.any()
        for i in range(batch):
            alone = ops.solve_spd(gram[i], rhs[i])
            torch.testing.assert_close(solution[i], alone[0], rtol=1e-11, atol=0)
            torch.testing.assert_close(reciprocal[i], alone[2], rtol=1e-6, atol=0)

    @pytest.mark.parametrize("position", [0, 1, 2])
    def test_a_bad_system_stays_alone(self, position: int, device: torch.device) -> None:
        grams, rhs = zip(*(self.system(9, device) for _ in range(3)), strict=True)
        gram, right = torch.stack(grams), torch.stack(rhs)
        good = ops.solve_spd(gram, right)
        gram[position, 4, 4] = -1
        solution, info, reciprocal = ops.solve_spd(gram, right)
        assert info.tolist() == [5 if i == position else 0 for i in range(3)]
        for i in range(3):
            if i == position:
                assert float(reciprocal[i]) == 0
                continue
            torch.testing.assert_close(solution[i], good[0][i], rtol=1e-12, atol=0)
            torch.testing.assert_close(reciprocal[i], good[2][i], rtol=1e-12, atol=0)

    def test_empty(self, device: torch.device) -> None:
        for shape, rows in (((0, 0), 0), ((0, 0), 3), ((0, 4, 4), 2), ((2, 4, 4), 0)):
            gram = torch.eye(shape[-1], dtype=F64, device=device).expand(shape).clone()
            rhs = torch.zeros(*shape[:-2], rows, shape[-1], dtype=F64, device=device)
            solution, info, reciprocal = ops.solve_spd(gram, rhs)
            assert solution.shape == rhs.shape
            assert info.shape == reciprocal.shape == shape[:-2]
            assert not info.any()

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_bad_numbers_are_not_called_a_success(self, bad: float, device: torch.device) -> None:
        gram, rhs = self.system(9, device)
        gram[6, 6] = bad
        _, info, reciprocal = ops.solve_spd(gram, rhs)
        assert int(info) != 0 or not float(reciprocal) > 0

    def test_only_the_lower_triangle_is_factored(self, device: torch.device) -> None:
        gram, rhs = self.system(9, device)
        _, info, _ = ops.solve_spd(gram, rhs)
        upper = gram.clone()
        upper[0, 8] = 1e9  # not positive definite, were it read
        assert int(ops.solve_spd(upper, rhs)[1]) == int(info) == 0

    @pytest.mark.parametrize("scale", [1e-150, 1e-20, 1e20, 1e150])
    def test_scale(self, scale: float, device: torch.device) -> None:
        gram, rhs = self.system(17, device)
        expected = ops.solve_spd(gram, rhs)
        solution, info, reciprocal = ops.solve_spd(gram * scale, rhs)
        assert int(info) == 0
        torch.testing.assert_close(solution * scale, expected[0], rtol=1e-10, atol=0)
        torch.testing.assert_close(reciprocal, expected[2], rtol=1e-6, atol=0)
