"""Concepts join and leave a factored system, and the map is that of a fresh solve."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor

from realera_fast import ops
from realera_fast.solver import (
    IncrementalSystem,
    NormalEquations,
    Pairs,
    SingularSystemError,
    least_squares,
)

F64 = torch.float64
WIDTH, RIDGE = 64, 0.3


def concept(rows: int, scale: float = 1.0) -> Pairs:
    x, y = torch.randn(rows, WIDTH, dtype=F64), torch.randn(rows, WIDTH, dtype=F64)
    return Pairs(scale * x, scale * y, torch.rand(rows, dtype=F64) + 0.5)


def prior(rows: int, device: torch.device) -> NormalEquations:
    x = torch.randn(rows, WIDTH, dtype=F64)
    equations = NormalEquations(WIDTH, device=device)
    return equations.update(Pairs(x, x, torch.ones(rows, dtype=F64))) if rows else equations


def fresh(start: NormalEquations, parts: list[Pairs]) -> Tensor:
    """T from the sums, by LU in one go."""
    gram = start.gram.cpu() + RIDGE * torch.eye(WIDTH, dtype=F64)
    cross = torch.zeros_like(gram)
    for part in parts:
        gram += part.source.mT @ (part.weight[:, None] * part.source)
        cross += (part.weight[:, None] * (part.destination - part.source)).mT @ part.source
    return torch.eye(WIDTH, dtype=F64) + torch.linalg.solve(gram, cross.mT).mT


def one(pairs: Pairs, device: torch.device) -> NormalEquations:
    return NormalEquations(WIDTH, device=device).update(pairs)


def close(got: Tensor, expected: Tensor) -> None:
    update = (expected - torch.eye(WIDTH, dtype=F64)).norm()
    assert (got.cpu() - expected).norm() <= 1e-10 * update


class TestAgainstAFreshSolve:
    @pytest.mark.parametrize("kept", [0, 100], ids=["no prior", "prior"])
    @pytest.mark.parametrize("rows", [1, 5, 20, 90])
    def test_add_and_remove(self, kept: int, rows: int, device: torch.device) -> None:
        start = prior(kept, device)
        system = IncrementalSystem(start, ridge=RIDGE)
        parts = {f"concept {i}": concept(rows) for i in range(5)}
        for i, (name, part) in enumerate(parts.items()):
            system.add(name, one(part, device))
            solution = system.solve(rank_tolerance=0.0, dtype=F64)
            close(solution.map.matrix, fresh(start, list(parts.values())[: i + 1]))
            assert solution.info.residual_ratio < 30
        for name in ("concept 3", "concept 0", "concept 4"):
            system.remove(name)
            del parts[name]
            solution = system.solve(rank_tolerance=0.0, dtype=F64)
            close(solution.map.matrix, fresh(start, list(parts.values())))
        assert system.concepts == ("concept 1", "concept 2")
        assert solution.info.rows == start.rows + 2 * rows

    def test_few_rows_are_not_a_fresh_start(
        self, monkeypatch: pytest.MonkeyPatch, device: torch.device
    ) -> None:
        start = prior(100, device)
        system = IncrementalSystem(start, ridge=RIDGE)
        parts = {str(i): concept(12) for i in range(4)}
        for name, part in parts.items():
            system.add(name, one(part, device))
        # 48 rows are more than half the width: they are drawn into the factored system.
        assert system.solve().info.method == "cholesky"
        factorisations = []
        original = torch.linalg.cholesky_ex
        monkeypatch.setattr(
            torch.linalg, "cholesky_ex", lambda a: factorisations.append(a.shape) or original(a)
        )
        monkeypatch.setattr(ops, "solve_spd", lambda *_: pytest.fail("solved anew"))
        added = concept(3)
        system.remove("1")
        system.add("new", one(added, device))
        solution = system.solve(rank_tolerance=0.0, dtype=F64)
        assert solution.info.method == "incremental" and not factorisations
        close(solution.map.matrix, fresh(start, [parts["0"], parts["2"], parts["3"], added]))

    def test_a_name_can_come_back_with_other_rows(self, device: torch.device) -> None:
        start = prior(100, device)
        system = IncrementalSystem(start, ridge=RIDGE).add("a", one(concept(40), device))
        system.solve()
        new = concept(2)
        system.remove("a").add("a", one(new, device))
        close(system.solve(rank_tolerance=0.0, dtype=F64).map.matrix, fresh(start, [new]))

    def test_weights_of_every_size(self, device: torch.device) -> None:
        # Taking a heavy concept away must not leave its rounding behind; what float64 can't keep
        # beside squares 1e8 times as great is lost, hence the limit.
        start = prior(100, device)
        light, heavy = concept(2), concept(40, scale=1e4)
        system = IncrementalSystem(start, ridge=RIDGE)
        system.add("light", one(light, device)).add("heavy", one(heavy, device)).solve()
        system.remove("heavy")
        solution = system.solve(rank_tolerance=0.0, dtype=F64)
        expected = fresh(start, [light])
        error = (solution.map.matrix.cpu() - expected).norm()
        assert error < 1e-6 * (expected - torch.eye(WIDTH, dtype=F64)).norm()
        assert solution.info.residual_ratio < 30

    def test_a_poor_update_is_noticed(
        self,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
        device: torch.device,
    ) -> None:
        from realera_fast.solver import incremental

        start, part = prior(100, device), concept(3)
        original = least_squares.signed_dual

        def spoiled(*arguments: Tensor) -> Tensor | None:
            found = original(*arguments)
            return None if found is None else found * (1 + 1e-3 * torch.randn_like(found))

        monkeypatch.setattr(incremental, "signed_dual", spoiled)
        system = IncrementalSystem(start, ridge=RIDGE).add("a", one(part, device))
        with caplog.at_level(logging.WARNING):
            solution = system.solve(rank_tolerance=0.0, dtype=F64)
        assert solution.info.method == "cholesky" and "residual ratio" in caplog.text
        close(solution.map.matrix, fresh(start, [part]))


class TestNothingLeft:
    @pytest.mark.parametrize("rows", [3, 50])
    def test_without_concepts_the_weights_stay_bit_for_bit(
        self, rows: int, device: torch.device
    ) -> None:
        system = IncrementalSystem(prior(100, device), ridge=RIDGE)
        assert system.solve().map.rank == 0
        system.add("a", one(concept(rows), device)).add("b", one(concept(rows), device))
        assert system.solve().map.rank > 0
        system.remove("a").solve()
        nothing = system.remove("b").solve()
        assert nothing.map.rank == 0 and nothing.info.method == "identity"
        weight = torch.randn(5, WIDTH, device=device)
        before = weight.clone()
        ops.low_rank_update_([weight], nothing.map.left, nothing.map.right)
        assert torch.equal(weight, before)

    def test_adding_and_removing_leaves_the_same_bits(self, device: torch.device) -> None:
        start, kept = prior(100, device), concept(4)
        a = IncrementalSystem(start, ridge=RIDGE).add("kept", one(kept, device))
        expected = a.solve(dtype=F64).map
        a.add("passing", one(concept(6), device)).solve()
        got = a.remove("passing").solve(dtype=F64).map
        assert torch.equal(got.left, expected.left) and torch.equal(got.right, expected.right)


class TestSaving:
    @pytest.mark.parametrize("kept", [0, 100], ids=["no prior", "prior"])
    @pytest.mark.parametrize("rows", [2, 50])
    def test_goes_on_where_it_was(self, kept: int, rows: int, device: torch.device) -> None:
        start, parts = prior(kept, device), [concept(rows), concept(rows), concept(1)]
        system = IncrementalSystem(start, ridge=RIDGE)
        system.add("a", one(parts[0], device)).add("b", one(parts[1], device)).solve()
        loaded = IncrementalSystem.from_tensors(system.tensors(), system.state())
        assert loaded.concepts == ("a", "b")
        loaded.remove("a").add("c", one(parts[2], torch.device("cpu")))
        close(loaded.solve(rank_tolerance=0.0, dtype=F64).map.matrix, fresh(start, parts[1:]))

    def test_damage_is_refused(self) -> None:
        system = IncrementalSystem(prior(100, torch.device("cpu")), ridge=RIDGE)
        system.add("a", one(concept(3), torch.device("cpu")))
        tensors, state = system.tensors(), system.state()
        for name, value in (
            ("factor", torch.zeros(WIDTH, WIDTH, dtype=F64)),
            ("prior", torch.zeros(3, 3, dtype=F64)),
            ("source.0", torch.full((3, WIDTH), float("nan"), dtype=F64)),
            ("source.0", torch.zeros(3, WIDTH - 1, dtype=F64)),
            ("other", torch.zeros(1)),
            ("prior", tensors["prior"].triu()),
            ("prior", tensors["prior"] * 2),
            ("prior", tensors["prior"] * float("nan")),
        ):
            with pytest.raises(ValueError):
                IncrementalSystem.from_tensors({**tensors, name: value}, state)
        with pytest.raises(ValueError):
            IncrementalSystem.from_tensors(tensors, {**state, "concepts": []})
        for name, wrong in (("width", 64.0), ("prior_rows", -1), ("rows", ["3"]), ("width", True)):
            with pytest.raises(ValueError):
                IncrementalSystem.from_tensors(tensors, {**state, name: wrong})


class TestMistakes:
    def test_names(self) -> None:
        system = IncrementalSystem(NormalEquations(WIDTH), ridge=RIDGE)
        system.add("a", NormalEquations(WIDTH).update(concept(2)))
        with pytest.raises(ValueError, match="'a' is in the system already"):
            system.add("a", NormalEquations(WIDTH))
        with pytest.raises(KeyError, match="'b' is not in the system"):
            system.remove("b")
        with pytest.raises(ValueError, match="^equations: expected a width of 64"):
            system.add("b", NormalEquations(3))

    def test_options(self) -> None:
        system = IncrementalSystem(NormalEquations(WIDTH), ridge=RIDGE)
        system.add("empty", NormalEquations(WIDTH))
        assert system.solve().map.rank == 0
        system.add("a", NormalEquations(WIDTH).update(concept(90)))
        for tolerance in (5, -1, float("nan")):
            with pytest.raises(ValueError, match="^rank_tolerance: "):
                system.solve(rank_tolerance=tolerance)
        with pytest.raises(TypeError, match="^equations: expected NormalEquations"):
            system.add("b", concept(2))  # type: ignore[arg-type]

    def test_a_prior_that_moves(self) -> None:
        with pytest.raises(ValueError, match="^prior: holds rows that move"):
            IncrementalSystem(NormalEquations(WIDTH).update(concept(2)), ridge=RIDGE)

    def test_rows_beyond_float64(self) -> None:
        system = IncrementalSystem(NormalEquations(WIDTH), ridge=RIDGE)
        with pytest.raises(ValueError, match="infinity"):
            system.add("a", NormalEquations(WIDTH).update(concept(90, scale=1e200)))

    def test_singular(self) -> None:
        system = IncrementalSystem(NormalEquations(WIDTH), ridge=0.0)
        system.add("a", NormalEquations(WIDTH).update(concept(2)))
        with pytest.raises(SingularSystemError, match="2 rows span 2 of 64"):
            system.solve()
