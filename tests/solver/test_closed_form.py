"""The closed form as mathematics: each property holds for the map, and does not hold without it."""

from __future__ import annotations

import dataclasses
import logging

import pytest
import torch
from torch import Tensor

from realera_fast import ops
from realera_fast.solver import (
    ClosedFormConfig,
    ConceptMap,
    NormalEquations,
    Pairs,
    SingularSystemError,
    concept_map,
    fit_values_,
    solve_layers,
)

WIDTH, MOVED, KEPT = 48, 3, 60
F64 = torch.float64


def example(width: int = WIDTH, moved: int = MOVED, kept: int = KEPT) -> tuple[Pairs, Pairs]:
    """Rows that move and rows that stay, in float64."""
    x, y = torch.randn(moved, width, dtype=F64), torch.randn(moved, width, dtype=F64)
    p = torch.randn(kept, width, dtype=F64)
    return (
        Pairs(x, y, torch.rand(moved, dtype=F64) + 0.5),
        Pairs(p, p.clone(), torch.rand(kept, dtype=F64) + 0.5),
    )


def solved(*pairs: Pairs, ridge: float = 0.1, tolerance: float = 0.0) -> ConceptMap:
    equations = NormalEquations(pairs[0].source.shape[1])
    for part in pairs:
        equations.update(part)
    return equations.solve(ridge=ridge, rank_tolerance=tolerance, dtype=F64).map


def objective(transform: Tensor, weight: Tensor, pairs: tuple[Pairs, ...], ridge: float) -> Tensor:
    """The sum that the closed form minimises, for one projection."""
    edited = weight @ transform
    total = ridge * (edited - weight).square().sum()
    for part in pairs:
        error = part.source @ edited.mT - part.destination @ weight.mT
        total = total + (part.weight * error.square().sum(1)).sum()
    return total


@pytest.mark.parametrize("moved", [2, 60])
def test_scaled_rows_are_rows_of_another_weight_that_go_another_way(moved: int) -> None:
    """While rows are kept, and when they are summed."""
    moving, staying = example(moved=moved)
    equations = NormalEquations(WIDTH).update(moving).update(staying)
    scaled = equations.scaled(3.0, 0.5)
    expected = NormalEquations(WIDTH)
    middle = moving.source + 0.5 * (moving.destination - moving.source)
    expected.update(Pairs(moving.source, middle, 3.0 * moving.weight))
    expected.update(Pairs(staying.source, staying.source, 3.0 * staying.weight))
    assert scaled.rows == expected.rows == equations.rows
    torch.testing.assert_close(scaled.gram, expected.gram)
    torch.testing.assert_close(scaled.cross, expected.cross)
    maps = [each.solve(ridge=0.1, rank_tolerance=0.0, dtype=F64).map for each in (scaled, expected)]
    torch.testing.assert_close(maps[0].matrix, maps[1].matrix)


class TestOptimum:
    def test_gradient_is_zero(self) -> None:
        pairs = example()
        # An invertible projection, so that no direction of T is free.
        weight = torch.randn(WIDTH, WIDTH, dtype=F64)
        gradients = []
        for transform in (torch.eye(WIDTH, dtype=F64), solved(*pairs).matrix):
            transform = transform.clone().requires_grad_()
            objective(transform, weight, pairs, 0.1).backward()
            assert transform.grad is not None
            gradients.append(transform.grad.norm())
        before, after = gradients
        assert before > 1
        assert after < 1e-10 * before

    @pytest.mark.parametrize("ridge", [1e-3, 0.5, 20.0])
    def test_no_nearby_map_is_better(self, ridge: float) -> None:
        pairs, weight = example(), torch.randn(20, WIDTH, dtype=F64)
        best = solved(*pairs, ridge=ridge).matrix
        lowest = objective(best, weight, pairs, ridge)
        assert lowest < objective(torch.eye(WIDTH, dtype=F64), weight, pairs, ridge)
        for _ in range(10):
            other = best + 1e-3 * torch.randn(WIDTH, WIDTH, dtype=F64)
            assert objective(other, weight, pairs, ridge) > lowest

    def test_agrees_with_a_solve_per_layer(self) -> None:
        # UCE (arXiv 2308.14761, equation 7), layer by layer, sums written out row by row.
        pairs, ridge = example(), 0.5
        ours = solved(*pairs, ridge=ridge)
        for outputs in (16, 40):
            weight = torch.randn(outputs, WIDTH, dtype=F64)
            left, right = ridge * weight, ridge * torch.eye(WIDTH, dtype=F64)
            for part in pairs:
                for x, y, w in zip(part.source, part.destination, part.weight, strict=True):
                    left = left + w * torch.outer(weight @ y, x)
                    right = right + w * torch.outer(x, x)
            expected = left @ torch.linalg.inv(right)
            edited = weight.clone()
            ops.low_rank_update_([edited], ours.left, ours.right)
            assert (edited - expected).abs().max() < 1e-10
            assert (weight - expected).abs().max() > 1e-2

    def test_targets_reach_their_anchors_as_the_ridge_shrinks(self) -> None:
        targets, _ = example()
        before = (targets.source - targets.destination).norm()
        distances = []
        for ridge in (1e2, 1.0, 1e-2, 1e-4, 1e-6):
            moved = solved(targets, ridge=ridge)(targets.source)
            distances.append(float((moved - targets.destination).norm() / before))
        assert distances == sorted(distances, reverse=True)
        assert distances[0] > 0.5
        assert distances[-1] < 1e-6

    def test_preserved_rows_move_less_for_being_preserved(self) -> None:
        targets, preserved = example(kept=20)
        with_them, without = solved(targets, preserved), solved(targets)
        shift = (with_them(preserved.source) - preserved.source).norm()
        shift_without = (without(preserved.source) - preserved.source).norm()
        assert shift < 0.1 * shift_without
        # And the targets still go.
        distance = (with_them(targets.source) - targets.destination).norm()
        assert distance < 0.2 * (targets.source - targets.destination).norm()

    def test_rank_is_the_number_of_rows_that_move(self) -> None:
        targets, preserved = example()
        assert solved(targets, preserved, tolerance=1e-6).rank == MOVED
        assert solved(preserved, tolerance=1e-6).rank == 0


class TestAccumulation:
    def test_does_not_depend_on_the_batches(self) -> None:
        pairs = Pairs(*(torch.cat(parts) for parts in zip(*map(fields, example()), strict=True)))
        whole = NormalEquations(WIDTH).update(pairs)
        rows = len(pairs.weight)
        for size in (1, 7, rows):
            parts = NormalEquations(WIDTH)
            for i in range(0, rows, size):
                parts.update(Pairs(*(field[i : i + size] for field in fields(pairs))))
            assert parts.rows == whole.rows == rows
            torch.testing.assert_close(parts.gram, whole.gram, rtol=1e-13, atol=1e-13)
            torch.testing.assert_close(parts.cross, whole.cross, rtol=1e-13, atol=1e-13)

    @pytest.mark.parametrize("kept", [10, 30, 200])
    def test_few_rows_that_move_keep_the_rank_low(self, kept: int) -> None:
        targets, preserved = example(kept=kept)
        mixed = Pairs(*(torch.cat(p) for p in zip(fields(targets), fields(preserved), strict=True)))
        solution = (
            NormalEquations(WIDTH).update(mixed).solve(ridge=0.1, rank_tolerance=0.0, dtype=F64)
        )
        assert (solution.map.rank, solution.info.method) == (MOVED, "dual")
        equations = NormalEquations(WIDTH).update(mixed)
        gram = equations.gram + 0.1 * torch.eye(WIDTH, dtype=F64)
        expected = torch.linalg.solve(gram, equations.cross.mT).mT
        torch.testing.assert_close(solution.map.left @ solution.map.right, expected)

    def test_equivalent_rows_hold_what_the_sums_hold(self) -> None:
        # A direction that the rows hardly have, and that they move by.
        x, c = torch.randn(1000, 8, dtype=F64), torch.randn(1000, 8, dtype=F64)
        x[:, 7] = 3e-8 * c[:, 0]
        equations = NormalEquations(8).update(Pairs(x, x + c, torch.ones(1000)))
        expected = equations.solve(ridge=1e-3, rank_tolerance=0.0, dtype=F64).map.matrix
        rows = equations.equivalent_rows()
        assert len(rows.weight) == 8
        got = NormalEquations(8).update(rows).solve(ridge=1e-3, rank_tolerance=0.0, dtype=F64)
        assert (got.map.matrix - expected).norm() < 1e-6 * expected.norm()

    @pytest.mark.parametrize("width", [4, WIDTH])
    def test_destinations_of_a_wider_dtype_keep_their_value(self, width: int) -> None:
        x, y = torch.randn(6, width).half(), 1e6 * torch.randn(6, width)
        ones = torch.ones(6)
        got = NormalEquations(width).update(Pairs(x, y, ones))
        expected = NormalEquations(width).update(Pairs(x.double(), y.double(), ones))
        assert torch.equal(got.cross, expected.cross) and bool(got.cross.isfinite().all())

    def test_wrong_types_are_named(self) -> None:
        targets, _ = example()
        with pytest.raises(TypeError, match="^weight: expected a torch.Tensor, got float"):
            Pairs(targets.source, targets.destination, 1.0)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="^ridge: expected a number, got NoneType"):
            NormalEquations(WIDTH).update(targets).solve(ridge=None)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"^dtype: expected torch\.float32 or"):
            NormalEquations(WIDTH).update(targets).solve(ridge=1.0, dtype=torch.bfloat16)

    def test_equivalent_rows_are_as_few_as_the_directions(self) -> None:
        targets = Pairs(
            *(torch.randn(200, 5, dtype=F64) @ torch.randn(5, WIDTH, dtype=F64) for _ in range(2)),
            torch.ones(200),
        )
        assert len(NormalEquations(WIDTH).update(targets).equivalent_rows().weight) == 5

    def test_whole_numbers_are_refused_and_nothing_is_added(self) -> None:
        targets, _ = example()
        equations = NormalEquations(WIDTH)
        with pytest.raises(ValueError, match=r"^pairs\.weight: expected floating point"):
            equations.update(Pairs(targets.source, targets.destination, torch.ones(MOVED).long()))
        assert equations.rows == 0 and equations.is_empty

    def test_weights_are_repetitions(self) -> None:
        targets, _ = example()
        twice = Pairs(targets.source, targets.destination, 2 * targets.weight)
        a = NormalEquations(WIDTH).update(targets).update(targets)
        b = NormalEquations(WIDTH).update(twice)
        torch.testing.assert_close(a.gram, b.gram)
        torch.testing.assert_close(a.cross, b.cross)

    def test_sum_and_difference(self) -> None:
        targets, preserved = example()
        a, b = NormalEquations(WIDTH).update(targets), NormalEquations(WIDTH).update(preserved)
        both = NormalEquations(WIDTH).update(targets).update(preserved)
        total = a + b
        assert total.rows == both.rows
        torch.testing.assert_close(total.gram, both.gram, rtol=1e-13, atol=1e-13)
        back = total - b
        assert back.rows == a.rows
        expected, got = a.solve(ridge=0.5).map.matrix, back.solve(ridge=0.5).map.matrix
        torch.testing.assert_close(got, expected)
        assert (got - total.solve(ridge=0.5).map.matrix).abs().max() > 1e-3
        # The operands are left alone.
        assert torch.equal(a.gram, NormalEquations(WIDTH).update(targets).gram)

    def test_moments_are_sums_of_rows(self) -> None:
        _, preserved = example()
        by_rows = NormalEquations(WIDTH).update(preserved)
        moment = preserved.source.mT @ (preserved.weight[:, None] * preserved.source)
        by_moments = NormalEquations(WIDTH).update_moments(moment)
        torch.testing.assert_close(by_moments.gram, by_rows.gram)
        assert not by_moments.cross.any() and by_moments.rows == 0
        by_moments.update_moments(moment, cross=moment)
        torch.testing.assert_close(by_moments.cross, moment)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
    def test_low_precision_rows_are_summed_exactly(self, dtype: torch.dtype) -> None:
        targets, preserved = example()
        low = [
            Pairs(p.source.to(dtype), p.destination.to(dtype), p.weight)
            for p in (targets, preserved)
        ]
        wide = [Pairs(p.source.to(F64), p.destination.to(F64), p.weight) for p in low]
        torch.testing.assert_close(solved(*low).matrix, solved(*wide).matrix, rtol=0, atol=1e-12)

    def test_mistakes(self) -> None:
        targets, _ = example()
        with pytest.raises(ValueError, match="^width: "):
            NormalEquations(0)
        with pytest.raises(ValueError, match="^pairs: expected rows of 5"):
            NormalEquations(5).update(targets)
        with pytest.raises(ValueError, match="^gram: expected shape"):
            NormalEquations(5).update_moments(torch.eye(4))
        with pytest.raises(ValueError, match="^cross: expected shape"):
            NormalEquations(4).update_moments(torch.eye(4), torch.eye(3))
        with pytest.raises(ValueError, match="^other: expected a width of 4"):
            NormalEquations(4) + NormalEquations(5)
        with pytest.raises(ValueError, match="^source: "):
            Pairs(torch.randn(4), torch.randn(4), torch.ones(4))
        with pytest.raises(ValueError, match="^destination: "):
            Pairs(torch.randn(4, 2), torch.randn(3, 2), torch.ones(4))
        with pytest.raises(ValueError, match="^weight: "):
            Pairs(torch.randn(4, 2), torch.randn(4, 2), torch.ones(3))


def fields(pairs: Pairs) -> tuple[Tensor, Tensor, Tensor]:
    return pairs.source, pairs.destination, pairs.weight


class TestSolve:
    def test_nothing_moves(self) -> None:
        _, preserved = example()
        solution = NormalEquations(WIDTH).update(preserved).solve(ridge=0.0)
        assert solution.info.method == "identity"
        assert solution.map.rank == solution.info.rank == 0
        assert solution.info.rows == KEPT
        weight = torch.randn(5, WIDTH)
        before = weight.clone()
        ops.low_rank_update_([weight], solution.map.left, solution.map.right)
        assert torch.equal(weight, before)
        assert torch.equal(solution.map(before), before)
        assert torch.equal(solution.map.matrix, torch.eye(WIDTH))

    def test_report(self) -> None:
        targets, preserved = example()
        equations = NormalEquations(WIDTH).update(targets).update(preserved)
        few = equations.solve(ridge=0.1).info
        gram = equations.gram + 0.1 * torch.eye(WIDTH, dtype=F64)
        # Asking for the sums drew the rows in.
        many = equations.solve(ridge=0.1).info
        assert (few.method, many.method) == ("dual", "cholesky")
        # The dual form bounds the 2-norm by that of the prior; Cholesky estimates the 1-norm.
        assert 0.3 <= few.condition / float(torch.linalg.cond(gram, 2)) <= 3
        assert 0.3 <= many.condition / float(torch.linalg.cond(gram, 1)) <= 1.001
        for info in (few, many):
            assert 0 <= info.residual_ratio < 30
            assert (info.rank, info.rows) == (MOVED, MOVED + KEPT)
            assert 0 <= info.dropped < 1e-12

    def test_ridge_zero_with_full_rank(self) -> None:
        pairs = example(width=10)
        moved = solved(*pairs, ridge=0.0)
        torch.testing.assert_close(moved.matrix, solved(*pairs, ridge=1e-13).matrix)

    def test_ridge_zero_and_too_few_rows(self) -> None:
        targets, _ = example()
        with pytest.raises(SingularSystemError, match="3 rows span 3 of 48 dimensions.*ridge"):
            NormalEquations(WIDTH).update(targets).solve(ridge=0.0)

    def test_more_taken_away_than_was_there(self) -> None:
        targets, preserved = example()
        wrong = NormalEquations(WIDTH).update(targets) - NormalEquations(WIDTH).update(preserved)
        with pytest.raises(SingularSystemError, match="indefinite.*taken away"):
            wrong.solve(ridge=0.1)

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_rows_that_are_not_finite(self, bad: float) -> None:
        targets, _ = example()
        targets.source[1, 2] = bad
        with pytest.raises(ValueError, match="NaN or infinity"):
            NormalEquations(WIDTH).update(targets).solve(ridge=0.1)

    @pytest.mark.parametrize("ridge", [-1.0, float("nan"), float("inf")])
    def test_bad_ridge(self, ridge: float) -> None:
        with pytest.raises(ValueError, match="^ridge: "):
            NormalEquations(4).solve(ridge=ridge)
        with pytest.raises(ValueError, match="^ridge: "):
            ClosedFormConfig(ridge=ridge)

    @pytest.mark.parametrize("tolerance", [-0.1, 1.0, float("nan")])
    def test_bad_rank_tolerance(self, tolerance: float) -> None:
        with pytest.raises(ValueError, match="^rank_tolerance: "):
            NormalEquations(4).solve(ridge=1.0, rank_tolerance=tolerance)
        with pytest.raises(ValueError, match="^rank_tolerance: "):
            ClosedFormConfig(rank_tolerance=tolerance)

    def test_config_is_frozen(self) -> None:
        with pytest.raises(dataclasses.FrozenInstanceError):
            ClosedFormConfig().ridge = 1.0  # type: ignore[misc]

    @pytest.mark.parametrize("width", [48, 320])
    def test_rank_cut_reports_what_it_drops(self, width: int) -> None:
        # Rows whose shifts fall off over many orders of magnitude.
        x = torch.randn(40, width, dtype=F64)
        shift = torch.randn(40, width, dtype=F64) * torch.logspace(0, -8, 40, dtype=F64)[:, None]
        equations = NormalEquations(width).update(Pairs(x, x + shift, torch.ones(40)))
        exact = equations.solve(ridge=0.1, rank_tolerance=0.0, dtype=F64).map
        whole = (exact.left @ exact.right).norm()
        ranks = []
        for tolerance in (1e-1, 1e-3, 1e-6):
            solution = equations.solve(ridge=0.1, rank_tolerance=tolerance, dtype=F64)
            missing = (solution.map.matrix - exact.matrix).norm() / whole
            assert solution.info.dropped == pytest.approx(float(missing), rel=1e-3)
            assert 0 < solution.info.dropped < tolerance * 40
            ranks.append(solution.map.rank)
        assert ranks == sorted(ranks) and ranks[0] < ranks[-1] < 40

    def test_the_cheap_decomposition_finds_what_the_full_one_does(self) -> None:
        width = 4 * concept_map.RANGE_START
        for rank in (1, concept_map.RANGE_START // 2, concept_map.RANGE_START, width):
            update = torch.randn(width, rank, dtype=F64) @ torch.randn(rank, width, dtype=F64)
            left, right, dropped = concept_map.split(update, 1e-9)
            assert left.shape == (width, rank)
            assert (left @ right - update).norm() < 1e-10 * update.norm()
            assert dropped < 1e-10

    def test_repeats_bit_for_bit(self) -> None:
        pairs = example(width=300)
        a, b = solved(*pairs, tolerance=1e-6), solved(*pairs, tolerance=1e-6)
        assert torch.equal(a.left, b.left) and torch.equal(a.right, b.right)


class TestLadder:
    """What happens when the first factorisation is not good enough. Nothing of it is silent."""

    def degrade(self, monkeypatch: pytest.MonkeyPatch, times: int, error: float) -> None:
        """Spoils the first solutions by a relative error."""
        original, calls = ops.solve_spd, iter(range(10**6))

        def spoiled(gram: Tensor, rhs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            solution, info, reciprocal = original(gram, rhs)
            if next(calls) < times:
                solution = solution * (1 + error * torch.randn_like(solution))
            return solution, info, reciprocal

        monkeypatch.setattr(ops, "solve_spd", spoiled)

    def test_refinement(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        pairs = example()
        expected = solved(*pairs).matrix
        # Neither the dual form nor the first factorisation of the sums is good enough.
        self.degrade(monkeypatch, 2, 1e-3)
        equations = NormalEquations(WIDTH).update(pairs[0]).update(pairs[1])
        with caplog.at_level(logging.WARNING):
            solution = equations.solve(ridge=0.1, rank_tolerance=0.0, dtype=F64)
        assert solution.info.method == "refined"
        assert solution.info.residual_ratio < 30
        assert "residual ratio" in caplog.text and "refining" in caplog.text
        torch.testing.assert_close(solution.map.matrix, expected)

    def test_jitter(self, caplog: pytest.LogCaptureFixture) -> None:
        # A ridge below the rounding of the rows' squares: Cholesky meets a negative pivot.
        targets, _ = example(width=100, moved=60)
        big = Pairs(1e6 * targets.source, 1e6 * targets.destination, targets.weight)
        equations = NormalEquations(100).update(big)
        gram = equations.gram.clone()
        gram.diagonal().add_(1e-9)
        assert int(ops.solve_spd(gram, gram)[1]) > 0, "the example is too easy"
        with caplog.at_level(logging.WARNING):
            solution = equations.solve(ridge=1e-9, dtype=F64)
        assert solution.info.method in ("jitter", "eigenvalue cut-off")
        assert "Cholesky met a minor" in caplog.text
        moved = solution.map(big.source)
        assert (moved - big.destination).norm() < 1e-6 * big.destination.norm()

    def test_eigenvalue_cut_off(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        pairs = example()
        expected = solved(*pairs).matrix
        # No factorisation is any good: every solution is nonsense.
        self.degrade(monkeypatch, 10**6, 1e6)
        equations = NormalEquations(WIDTH).update(pairs[0]).update(pairs[1])
        with caplog.at_level(logging.WARNING):
            solution = equations.solve(ridge=0.1, rank_tolerance=0.0, dtype=F64)
        assert solution.info.method == "eigenvalue cut-off"
        assert "jitter" in caplog.text and "eigenvalue cut-off" in caplog.text
        torch.testing.assert_close(solution.map.matrix, expected)

    def test_a_ridge_too_small_is_warned_of(self, caplog: pytest.LogCaptureFixture) -> None:
        # The same rows with other destinations: only the ridge says how far to follow either.
        targets, _ = example()
        other = Pairs(targets.source, -targets.destination, targets.weight)
        equations = NormalEquations(WIDTH).update(targets).update(other)
        with caplog.at_level(logging.WARNING):
            equations.solve(ridge=0.1)
        assert not caplog.text
        with caplog.at_level(logging.WARNING):
            equations.solve(ridge=1e-18)
        assert "singular to working precision" in caplog.text


class TestConceptMap:
    def random(self, rank: int = 4, dtype: torch.dtype = F64) -> ConceptMap:
        left, right = torch.randn(WIDTH, rank), torch.randn(rank, WIDTH)
        return ConceptMap(left.to(dtype) / WIDTH, right.to(dtype))

    def test_call_is_the_matrix(self) -> None:
        concept_map, x = self.random(), torch.randn(2, 7, WIDTH, dtype=F64)
        torch.testing.assert_close(concept_map(x), x @ concept_map.matrix.mT)
        assert (concept_map(x) - x).norm() > 0.1

    def test_moving_the_prompt_is_editing_the_weight(self) -> None:
        concept_map = self.random()
        x, weight = torch.randn(7, WIDTH, dtype=F64), torch.randn(5, WIDTH, dtype=F64)
        by_prompt = concept_map(x) @ weight.mT
        ops.low_rank_update_([weight], concept_map.left, concept_map.right)
        torch.testing.assert_close(x @ weight.mT, by_prompt)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, F64], ids=str)
    def test_keeps_the_dtype_of_embeddings(self, dtype: torch.dtype) -> None:
        x = torch.randn(3, WIDTH).to(dtype)
        moved = self.random(dtype=torch.float32)(x)
        assert moved.dtype == dtype and moved.shape == x.shape

    def test_compose(self) -> None:
        first, second, x = self.random(2), self.random(3), torch.randn(5, WIDTH, dtype=F64)
        both = first.compose(second)
        assert both.rank == 5
        torch.testing.assert_close(both(x), second(first(x)))
        torch.testing.assert_close(both.matrix, second.matrix @ first.matrix)
        assert (both(x) - first(second(x))).norm() > 1e-3
        nothing = ConceptMap(torch.zeros(WIDTH, 0, dtype=F64), torch.zeros(0, WIDTH, dtype=F64))
        torch.testing.assert_close(first.compose(nothing).matrix, first.matrix)
        torch.testing.assert_close(nothing.compose(first).matrix, first.matrix)
        with pytest.raises(ValueError, match="^other: expected a map of width 48"):
            first.compose(ConceptMap.identity(5))

    def test_compressed(self) -> None:
        once = self.random(3)
        twice = ConceptMap(torch.cat((once.left, once.left), 1), torch.cat((once.right,) * 2, 0))
        assert twice.rank == 6
        thin = twice.compressed()
        assert thin.rank == 3
        torch.testing.assert_close(thin.matrix, twice.matrix)
        cancelled = ConceptMap(torch.cat((once.left, -once.left), 1), twice.right)
        assert cancelled.compressed().rank == 0
        assert ConceptMap.identity(WIDTH).compressed().rank == 0
        assert once.compressed(0.9999).rank < once.rank

    def test_identity(self) -> None:
        nothing, x = ConceptMap.identity(WIDTH), torch.randn(3, WIDTH)
        assert (nothing.rank, nothing.width) == (0, WIDTH)
        assert torch.equal(nothing(x), x)

    def test_mistakes(self) -> None:
        with pytest.raises(ValueError, match="expected shapes"):
            ConceptMap(torch.randn(4, 2), torch.randn(4, 2))
        with pytest.raises(ValueError, match="expected float32 or float64"):
            ConceptMap(torch.randn(4, 2).half(), torch.randn(2, 4).half())
        with pytest.raises(ValueError, match="^embeddings: expected shape"):
            ConceptMap.identity(4)(torch.randn(3, 5))


def test_follows_the_device(device: torch.device) -> None:
    targets, preserved = example()
    expected = solved(targets, preserved).matrix
    equations = NormalEquations(WIDTH, device=device).update(targets).update(preserved)
    solution = equations.solve(ridge=0.1, rank_tolerance=0.0, dtype=F64)
    assert solution.map.left.device.type == device.type
    torch.testing.assert_close(solution.map.to("cpu").matrix, expected)
    x = torch.randn(3, WIDTH, device=device)
    assert solution.map.to("cpu")(x).device == x.device


class TestLayers:
    """One system for each layer."""

    def systems(self, counts: list[int], device: torch.device) -> list[NormalEquations]:
        return [
            NormalEquations(WIDTH, device=device).update(example(moved=n, kept=0)[0])
            for n in counts
        ]

    @pytest.mark.parametrize("counts", [[4, 4, 4], [1, 4, 4, 90], [0, 3], []], ids=str)
    def test_each_is_solved_as_if_alone(self, counts: list[int], device: torch.device) -> None:
        systems = self.systems(counts, device)
        together = solve_layers(systems, ridge=0.1, rank_tolerance=0.0, dtype=F64)
        assert len(together) == len(counts)
        for count, system, solution in zip(counts, systems, together, strict=True):
            alone = system.solve(ridge=0.1, rank_tolerance=0.0, dtype=F64)
            assert solution.map.rank == min(count, WIDTH)
            torch.testing.assert_close(solution.map.matrix, alone.map.matrix)
            assert solution.info.residual_ratio < 30

    def test_edits_every_layer_with_its_own_map(self, device: torch.device) -> None:
        maps = [
            s.map
            for s in solve_layers(self.systems([2, 5, 5], device), ridge=0.1, dtype=torch.float32)
        ]
        weights = [torch.randn(o, WIDTH, device=device) for o in (3, 8, 21)]
        expected = [w @ m.matrix for w, m in zip(weights, maps, strict=True)]
        ops.low_rank_update_(weights, [m.left for m in maps], [m.right for m in maps])
        for weight, wanted in zip(weights, expected, strict=True):
            torch.testing.assert_close(weight, wanted)

    def test_the_singular_one_is_named(self) -> None:
        targets, _ = example(moved=2)
        good = NormalEquations(WIDTH).update(example(moved=90, kept=0)[0])
        with pytest.raises(SingularSystemError, match=r"^equations\[1\]: .*singular"):
            solve_layers([good, NormalEquations(WIDTH).update(targets)], ridge=0.0)

    def test_mistakes(self) -> None:
        with pytest.raises(ValueError, match="^equations: expected systems of one width"):
            solve_layers([NormalEquations(3), NormalEquations(4)], ridge=1.0)


class TestFitValues:
    """One system, and destinations of its own for each layer."""

    @pytest.mark.parametrize("rows", [1, 7, 100])
    @pytest.mark.parametrize("kept", [0, 60])
    def test_is_the_minimum(self, rows: int, kept: int, device: torch.device) -> None:
        x, weight = torch.randn(rows, WIDTH, dtype=F64), torch.rand(rows, dtype=F64)
        p = torch.randn(kept, WIDTH, dtype=F64)
        weights = [torch.randn(o, WIDTH, dtype=F64) for o in (1, 9, 60)]
        values = [torch.randn(rows, len(w), dtype=F64) for w in weights]
        preserved = NormalEquations(WIDTH, device=device)
        if kept:
            preserved.update(Pairs(p, p, torch.ones(kept)))
        edited = [w.clone().to(device) for w in weights]
        fit_values_(
            edited,
            x.to(device),
            [v.to(device) for v in values],
            weight.to(device),
            ridge=0.2,
            preserved=preserved if kept else None,
        )
        # Equation 7 of MACE (arXiv 2403.06135), layer by layer.
        a = 0.2 * torch.eye(WIDTH, dtype=F64) + x.mT @ (weight[:, None] * x) + p.mT @ p
        for before, value, after in zip(weights, values, edited, strict=True):
            b = 0.2 * before + value.mT @ (weight[:, None] * x) + before @ p.mT @ p
            expected = torch.linalg.solve(a, b.mT).mT
            torch.testing.assert_close(after.cpu(), expected)
            assert (before - expected).norm() > 1e-2

    @pytest.mark.parametrize("rows", [5, 40])
    def test_no_garbage_where_the_system_is_all_but_singular(
        self, rows: int, caplog: pytest.LogCaptureFixture
    ) -> None:
        # Rows around two directions, and a ridge far below their rounding: no digit is certain in
        # the six others, but they must stay small, and it is said or refused.
        x = torch.randn(rows, 2, dtype=F64) @ torch.randn(2, 8, dtype=F64)
        weight = torch.randn(3, 8, dtype=F64)
        before, values = weight.clone(), torch.randn(rows, 3, dtype=F64)
        with caplog.at_level(logging.WARNING):
            try:
                fit_values_([weight], x, [values], torch.full((rows,), 1e8), ridge=1e-8)
            except SingularSystemError:
                assert torch.equal(weight, before)
                return
        assert "singular to working precision" in caplog.text
        best = torch.linalg.lstsq(x, values - x @ before.mT, driver="gelsd").solution.mT
        assert (weight - before - best).norm() < 0.3 * best.norm()

    def test_report(self) -> None:
        targets, _ = example()
        weight = torch.randn(9, WIDTH)
        values = [targets.destination.float() @ weight.mT]
        info = fit_values_([weight], targets.source, values, targets.weight, ridge=0.1)
        assert (info.method, info.rows) == ("dual", MOVED) and info.residual_ratio < 30

    def test_values_of_an_anchor_are_the_shared_map(self) -> None:
        targets, _ = example()
        weight = torch.randn(9, WIDTH, dtype=F64)
        by_values = weight.clone()
        fit_values_(
            [by_values],
            targets.source,
            [targets.destination @ weight.mT],
            targets.weight,
            ridge=0.1,
        )
        concept_map = solved(targets)
        ops.low_rank_update_([weight], concept_map.left, concept_map.right)
        torch.testing.assert_close(by_values, weight)

    def test_mistakes(self) -> None:
        targets, _ = example()
        weight, value = torch.randn(9, WIDTH), torch.randn(MOVED, 9)

        def fit(**changes: object) -> None:
            given = {
                "weights": [weight],
                "source": targets.source,
                "values": [value],
                "weight": targets.weight,
                "ridge": 0.1,
                **changes,
            }
            fit_values_(**given)  # type: ignore[arg-type]

        with pytest.raises(ValueError, match="^values: expected 1 tensors"):
            fit(values=[])
        with pytest.raises(ValueError, match=r"^values\[0\]: expected shape"):
            fit(values=[value.mT])
        with pytest.raises(ValueError, match=r"^values\[0\]: holds NaN"):
            fit(values=[value * float("nan")])
        with pytest.raises(ValueError, match=r"^weights\[0\]: expected shape \[o, 48\]"):
            fit(weights=[weight[:, :5]])
        with pytest.raises(ValueError, match="^preserved: expected a width of 48, got 5"):
            fit(preserved=NormalEquations(5))
        with pytest.raises(ValueError, match="row 0 is negative"):
            fit(weight=-targets.weight)
        with pytest.raises(ValueError, match="^preserved: holds rows that move"):
            fit(preserved=NormalEquations(WIDTH).update(targets))
        with pytest.raises(SingularSystemError, match="singular"):
            fit(ridge=0.0)
