"""The equations of an erasure, kept factored: concepts join and leave without a fresh start.

Recursive least squares. With T_0 the map of the system before, whose matrix A_0 is factored, and
rows X that join (sign 1) or leave (-1),

    T = T_0 + E^T Z,    Z = (S + X A_0^-1 X^T)^-1 X A_0^-1,    E = Y - X T_0^T,

is the map of the system after: O(n d^2) for n rows, where a fresh factorisation is O(d^3). Where
the rows become too many for that to pay, or rounding has built up, the system is factored anew.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from realera_fast.solver.closed_form import (
    NormalEquations,
    Solution,
    SolveInfo,
    check_options,
    finish,
)
from realera_fast.solver.concept_map import ConceptMap
from realera_fast.solver.config import check_ridge
from realera_fast.solver.least_squares import (
    Factored,
    Scaled,
    Solved,
    is_good,
    primal,
    probes,
    residual_ratio,
    signed_dual,
    with_ridge,
)
from realera_fast.solver.rows import Pairs


@dataclass
class _Change:
    """Rows that are in the system but not in its factorisation, or the other way round."""

    rows: Pairs
    sign: float
    solved: Tensor | None = None
    """`[n, d]` the rows times the inverse of the factored matrix, once computed."""


class IncrementalSystem:
    """Normal equations by concept, with a factorisation that is updated, not repeated.

    The rows of each concept are kept (at most d of them: more are replaced by fewer with the same
    sums, to rounding), so that a concept that leaves takes away what it brought. Without any
    concept the map is the identity, of rank 0: applying it writes nothing, so the original weights
    are the ones that come back.
    """

    def __init__(self, prior: NormalEquations, *, ridge: float) -> None:
        """Factors what stays whatever is erased.

        Args:
            prior: rows and moments that keep their place; none may move.
            ridge: added to the diagonal of A, not negative.
        """
        check_ridge(ridge)
        if prior.moves:
            raise ValueError("prior: holds rows that move; add them as a concept")
        self.width = prior.width
        self.ridge = ridge
        self._prior_rows = prior.rows
        self._prior: Factored | Scaled = Scaled(ridge)
        if not prior.is_empty:
            self._prior = Factored(with_ridge(prior.gram, ridge))
        self._device = prior.device
        self._rows: dict[str, Pairs] = {}
        self._counts: dict[str, int] = {}
        self._start()

    @property
    def concepts(self) -> tuple[str, ...]:
        """Names of the concepts, in the order they came."""
        return tuple(self._rows)

    def add(self, name: str, equations: NormalEquations) -> IncrementalSystem:
        """Adds a concept with all its rows. Returns itself.

        Raises:
            ValueError: the name is taken, or the sums are not those of rows.
        """
        if not isinstance(equations, NormalEquations):
            raise TypeError(
                "equations: expected NormalEquations(width).update(pairs), "
                f"got {type(equations).__name__}"
            )
        if name in self._rows:
            raise ValueError(f"name: {name!r} is in the system already; remove it first")
        if equations.width != self.width:
            raise ValueError(f"equations: expected a width of {self.width}, got {equations.width}")
        rows = Pairs(*(t.to(self._device) for t in equations.equivalent_rows().tensors))
        self._rows[name], self._counts[name] = rows, equations.rows
        self._joined[name] = _Change(rows, 1.0)
        return self

    def remove(self, name: str) -> IncrementalSystem:
        """Withdraws a concept with all its rows. Returns itself.

        Raises:
            KeyError: there is no such concept.
        """
        if name not in self._rows:
            raise KeyError(f"{name!r} is not in the system; it has {list(self._rows)}")
        rows = self._rows.pop(name)
        if self._joined.pop(name, None) is None:
            self._left.append(_Change(rows, -1.0))
        return self

    def copy(self) -> IncrementalSystem:
        """One that changes apart from this one; the matrices, which never change, are shared."""
        twin = copy.copy(self)
        twin._rows, twin._joined = dict(self._rows), dict(self._joined)
        twin._left, twin._counts = list(self._left), dict(self._counts)
        return twin

    def solve(
        self, *, rank_tolerance: float = 1e-6, dtype: torch.dtype = torch.float32
    ) -> Solution:
        """The map of the concepts that are in the system now.

        Equal to `NormalEquations.solve` of the same rows, as far as float64 tells them apart.

        Raises:
            SingularSystemError: A is not positive definite to working precision.
        """
        check_options(rank_tolerance, dtype)
        count = self._prior_rows + sum(self._counts[name] for name in self._rows)
        if not any(bool((r.source != r.destination).any()) for r in self._rows.values()):
            nothing = ConceptMap.identity(self.width, device=self._device, dtype=dtype)
            return Solution(nothing, SolveInfo.identity(count))
        solved = self._updated()
        if solved is None:
            self._factor_anew()
            solved = self._base
        assert solved is not None
        return finish(solved, count, rank_tolerance, dtype)

    # Saving

    def tensors(self) -> dict[str, Tensor]:
        """Everything needed to go on, by name, on the CPU: float64 but for no loss."""
        found: dict[str, Tensor] = {}
        if isinstance(self._prior, Factored):
            found["prior"] = self._prior.matrix
            found["factor"] = self._prior.factor
        for number, rows in enumerate(self._rows.values()):
            found[f"source.{number}"] = rows.source
            found[f"destination.{number}"] = rows.destination
        return {name: tensor.detach().cpu().contiguous() for name, tensor in found.items()}

    def state(self) -> dict[str, Any]:
        """The rest of what is needed to go on, as plain JSON values."""
        return {
            "width": self.width,
            "ridge": self.ridge,
            "prior_rows": self._prior_rows,
            "concepts": list(self._rows),
            "rows": [self._counts[name] for name in self._rows],
        }

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, Tensor], state: Mapping[str, Any]
    ) -> IncrementalSystem:
        """The inverse of :meth:`tensors` and :meth:`state`; nothing is factored again.

        Raises:
            ValueError, KeyError, TypeError: they don't fit together.
        """
        width, names, counts = state["width"], state["concepts"], state["rows"]
        prior_rows = state["prior_rows"]
        whole = (width, prior_rows, *counts)
        if not all(type(number) is int and number >= 0 for number in whole) or width < 1:
            raise ValueError(
                "width, rows, prior_rows: expected whole numbers that are not negative"
            )
        if not (type(names) is type(counts) is list and len(names) == len(counts)):
            raise ValueError("concepts, rows: expected lists of equal length")
        system = cls(NormalEquations(width), ridge=float(state["ridge"]))
        system._prior_rows = prior_rows
        expected = {f"{part}.{i}" for part in ("source", "destination") for i in range(len(names))}
        if "prior" in tensors:
            expected |= {"prior", "factor"}
            prior, factor = tensors["prior"], tensors["factor"]
            if prior.shape != (width, width) or factor.shape != prior.shape:
                raise ValueError(f"prior, factor: expected shape {[width, width]}")
            system._prior = system._matrix = Factored(prior, factor)
            probe = probes(width, prior.device)
            error = (probe @ factor) @ factor.mT - probe @ prior
            fits = float(error.norm()) <= 1e-6 * float((probe @ prior).norm())
            if not fits or not torch.equal(prior, prior.mT) or not system._prior.usable:
                raise ValueError("prior, factor: are not a positive definite matrix and its factor")
        if set(tensors) != expected or len(set(names)) != len(names):
            raise ValueError(f"expected tensors {sorted(expected)}, got {sorted(tensors)}")
        for i, name in enumerate(names):
            rows = tensors[f"source.{i}"]
            pairs = Pairs(rows, tensors[f"destination.{i}"], rows.new_ones(len(rows)))
            if rows.shape[1] != width or len(rows) > width or rows.dtype != torch.float64:
                raise ValueError(f"source.{i}: expected at most {width} float64 rows of {width}")
            pairs.check()
            system._rows[name], system._counts[name] = pairs, counts[i]
            system._joined[name] = _Change(pairs, 1.0)
        return system

    # Inside

    def _start(self) -> None:
        """Goes back to the prior alone as the factored system."""
        self._matrix: Factored | Scaled = self._prior
        self._base: Solved | None = None
        self._joined = {name: _Change(rows, 1.0) for name, rows in self._rows.items()}
        self._left: list[_Change] = []

    def _times(self, rows: Tensor) -> Tensor:
        """``rows A`` of the system as it should be now, from the rows themselves."""
        found = self._prior.times(rows)
        for pairs in self._rows.values():
            found = found + (rows @ pairs.source.mT) @ pairs.source
        return found

    def _wanted(self, rows: Tensor) -> Tensor:
        """``rows D^T`` of the system as it should be now."""
        found = torch.zeros_like(rows)
        for pairs in self._rows.values():
            found = found + (rows @ pairs.source.mT) @ (pairs.destination - pairs.source)
        return found

    def _updated(self) -> Solved | None:
        """The solution from the factored system, or None where a fresh one is better."""
        changes = [*self._joined.values(), *self._left]
        count = sum(len(change.rows.weight) for change in changes)
        if not self._matrix.usable or 2 * count > self.width:
            return None
        if not changes:
            return self._base
        for change in changes:
            if change.solved is None:
                change.solved = self._matrix.solve(change.rows.source)
        x = torch.cat([change.rows.source for change in changes])
        error = torch.cat([change.rows.destination for change in changes]) - x
        if self._base is not None:
            error = error - self._base.move(x)
        signs = torch.cat([change.sign * change.rows.weight for change in changes])
        solved_rows = torch.cat([c.solved for c in changes if c.solved is not None])
        right = signed_dual(x, solved_rows, signs)
        if right is None:
            return None
        found = Solved(error.mT, right) if self._base is None else self._base.plus(error.mT, right)
        probe = probes(self.width, self._device)
        ratios, norms = residual_ratio(found, self._times, self._wanted(probe), probe)
        condition = norms[0] * self._prior.inverse_norm
        solved = Solved(found.left, found.right, "incremental", condition, ratios[0])
        return solved if is_good(solved) else None

    def _factor_anew(self) -> None:
        """Draws all rows into the factored system."""
        identity = torch.eye(self.width, dtype=torch.float64, device=self._device)
        gram, cross = self._prior.times(identity), torch.zeros_like(identity)
        for rows in self._rows.values():
            gram += rows.source.mT @ rows.source
            cross += (rows.destination - rows.source).mT @ rows.source
        gram = (gram + gram.mT) / 2
        self._base = primal(
            gram, cross, self.ridge, sum(len(r.weight) for r in self._rows.values())
        )
        self._matrix = Factored(gram)
        self._joined, self._left = {}, []
