"""Weighted least squares ``X A = D`` with ``A = A_0 + sum x x^T``, solved and checked.

The dual form for few rows, the primal form for many, and a ladder of ever more careful methods
where the residual is not as small as float64 allows. Nothing here knows what the rows mean.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from realera_fast import ops

_log = logging.getLogger(__name__)

_EPS = torch.finfo(torch.float64).eps
_RESIDUAL_THRESHOLD = 30.0
"""LAPACK's own test suite accepts a solution whose residual ratio is below this (``dtest.in``)."""
_REFINEMENTS = 5
"""Further refinement steps before the solver changes its method. LAPACK's ``porfs`` takes five."""
_PROBES = 8
"""Random vectors that estimate the norm of a residual, which would cost a product to form."""


class SingularSystemError(ValueError):
    """The normal equations have no unique solution. The message says why and what to do."""


@dataclass(frozen=True)
class Solved:
    """``X = T - I``, low-rank (`left @ right`) or dense (`left` alone), and how it was found."""

    left: Tensor
    right: Tensor | None
    method: str = ""
    condition: float = math.inf
    residual_ratio: float = math.inf

    def move(self, rows: Tensor) -> Tensor:
        """``rows X^T``: by how much the map moves each row."""
        return rows @ self.left.mT if self.right is None else (rows @ self.right.mT) @ self.left.mT

    def plus(self, left: Tensor, right: Tensor) -> Solved:
        """``X + left @ right``."""
        if self.right is None:
            return Solved(self.left + left @ right, None)
        return Solved(torch.cat((self.left, left), 1), torch.cat((self.right, right), 0))


class Scaled:
    """The matrix ``ridge I``."""

    def __init__(self, ridge: float) -> None:
        self.ridge = ridge

    def solve(self, rows: Tensor) -> Tensor:
        return rows / self.ridge

    def times(self, rows: Tensor) -> Tensor:
        return rows * self.ridge

    @property
    def usable(self) -> bool:
        """Whether the matrix is positive definite."""
        return self.ridge > 0

    @property
    def inverse_norm(self) -> float:
        """``|A_0^-1|_2``."""
        return 1 / self.ridge


class Factored:
    """A dense symmetric positive definite matrix and its Cholesky factor."""

    def __init__(self, matrix: Tensor, factor: Tensor | None = None) -> None:
        self.matrix = matrix
        self.info = 0
        if factor is None:
            factor, info = torch.linalg.cholesky_ex(matrix)
            self.info = int(info)
        self.factor = factor

    @property
    def usable(self) -> bool:
        """Whether the matrix is positive definite beyond rounding."""
        diagonal = self.factor.diagonal()
        # The pivots bound the condition number from below; the residual tells the rest.
        return self.info == 0 and bool(diagonal.amin() ** 2 > _EPS * diagonal.amax() ** 2)

    def solve(self, rows: Tensor) -> Tensor:
        return torch.cholesky_solve(rows.mT, self.factor).mT

    def times(self, rows: Tensor) -> Tensor:
        return rows @ self.matrix

    @property
    def inverse_norm(self) -> float:
        """``|A_0^-1|_2``, estimated."""
        probe = probes(len(self.matrix), self.matrix.device)
        return float(_norm(self.solve, self.solve(probe)))


def with_ridge(gram: Tensor, ridge: float) -> Tensor:
    """A copy with ``ridge`` added to the diagonal."""
    gram = gram.clone()
    gram.diagonal().add_(ridge)
    return gram


def dual(x: Tensor, change: Tensor, base: Scaled | Factored) -> list[Solved]:
    """Solves systems of few rows, their weights drawn in.

    Args:
        x: `[n, d]` sources of one system, or `[l, n, d]` of several.
        change: destinations minus sources, of the same shape.
        base: A_0, shared.
    """
    solved = dual_rows(x, base, change)
    rows = solved.rows
    # Rows that stay shape A and so the others, but add nothing to the map.
    moving = change.any(-1)
    moving = moving.any(0) if x.dim() == 3 else moving
    if not bool(moving.all()):
        change, rows = change[..., moving, :], rows[..., moving, :]
    if x.dim() == 2:
        change, rows = change[None], rows[None]
    return [
        Solved(left.mT, right, "dual", condition, ratio)
        for left, right, condition, ratio in zip(
            change, rows, solved.conditions, solved.residual_ratios, strict=True
        )
    ]


class DualRows(NamedTuple):
    """Rows R of ``X A^-1`` of one system or several."""

    rows: Tensor
    """Like the rows X."""
    residual_ratios: list[float]
    """Of each system; infinity where it failed."""
    conditions: list[float]
    """Condition number of each A."""


def dual_rows(x: Tensor, base: Scaled | Factored, change: Tensor | None = None) -> DualRows:
    """Rows R of ``X A^-1`` for ``A = A_0 + X^T X``, from an `[n, n]` system.

    The small system is inverted, as products with rows as they lie are cheaper than a solve, which
    would transpose them; refinement makes up for it where that costs accuracy.

    Args:
        x: `[n, d]` or `[l, n, d]` rows X.
        base: A_0, shared.
        change: what the map adds to each source, if it is ``change^T R`` that has to be accurate.

    """
    y = base.solve(x)
    system = x @ y.mT
    system.diagonal(dim1=-2, dim2=-1).add_(1.0)
    eye = torch.eye(x.shape[-2], dtype=x.dtype, device=x.device).expand_as(system)
    inverse, info, reciprocal = ops.solve_spd(system, eye)
    for value in reciprocal.reshape(-1).tolist():
        if value < _EPS:
            _warn_singular(1 / value if value else math.inf)
    probe = probes(x.shape[-1], x.device)
    inner = probe @ x.mT
    image = base.times(probe) + inner @ x
    wanted = inner if change is None else inner @ change
    if isinstance(base, Scaled):
        # Fewer rows than features: the spectrum of A is that of G, times the ridge.
        norm = base.ridge * _norm(lambda v: v @ system, inner @ system)
        inverse_norm = torch.full_like(norm, 1 / base.ridge)
    else:
        norm = _norm(lambda v: base.times(v) + (v @ x.mT) @ x, image)
    rows = inverse @ y
    for refined in (False, True):
        error, size = (
            (v @ rows.mT if change is None else (v @ rows.mT) @ change)
            for v in (image, probe.expand_as(image))
        )
        ratios = _ratios(error - wanted, size, norm, x.shape[-1], info)
        if refined or all(ratio < 1 for ratio in ratios):
            break
        rows = rows + inverse @ (y - system @ rows)
    if isinstance(base, Factored):
        # A^-1 = A_0^-1 (I - X^T R).
        def solve(v: Tensor) -> Tensor:
            return base.solve(v - (v @ rows.mT) @ x)

        inverse_norm = _norm(solve, solve(probe))
    return DualRows(rows, ratios, (norm * inverse_norm).reshape(-1).tolist())


def is_good(solved: Solved) -> bool:
    """Whether the residual is small; says so in the log if it is not."""
    good = solved.residual_ratio < _RESIDUAL_THRESHOLD
    if not good:
        _log.warning(
            "the %s solution left a residual ratio of %.3g; all rows are summed and factored",
            solved.method,
            solved.residual_ratio,
        )
    return good


def signed_dual(x: Tensor, y: Tensor, signs: Tensor) -> Tensor | None:
    """`[n, d]` rows Z with ``T = T_0 + E^T Z`` when rows join (sign 1) and leave (-1) a system.

    Recursive least squares: ``Z = (S + X A_0^-1 X^T)^-1 X A_0^-1`` with E the rows' error under
    the map T_0 that solves the system before.

    Args:
        x: `[n, d]` sources, weights drawn in.
        y: `[n, d]` ``X A_0^-1``.
        signs: `[n]` 1 or -1.

    Returns:
        None if the rows that leave were not part of the system (it would be indefinite).
    """
    system = x @ y.mT + signs.diag()
    # A is positive definite just if G has as many negative eigenvalues as rows leave.
    if int((torch.linalg.eigvalsh(system) < 0).sum()) != int((signs < 0).sum()):
        return None
    return torch.linalg.solve(system, y)


# The primal system and its ladder


def primal(gram: Tensor, rhs: Tensor, ridge: float, rows: int) -> Solved:
    """Climbs the ladder until a solution of ``X gram = rhs`` has a small residual.

    Args:
        gram: `[d, d]` A, ridge included.
        rhs: `[d, d]` D.
        ridge: what the ridge was, for messages.
        rows: how many rows A holds, for messages.

    Returns:
        The dense X = T - I.
    """
    # A sum shows any NaN or infinity, and no sum worth solving overflows.
    if not (math.isfinite(float(gram.sum())) and math.isfinite(float(rhs.sum()))):
        raise ValueError(
            "the accumulated sums hold NaN or infinity: squares of the rows overflow float64"
        )
    solution, info, reciprocal = ops.solve_spd(gram, rhs)
    failed, rcond = bool(info), float(reciprocal)
    condition = 1 / rcond if rcond > 0 else math.inf
    if ridge == 0 and (failed or rcond < _EPS * gram.shape[0]):
        raise SingularSystemError(explain(gram, ridge, rows))
    if rcond < _EPS:
        _warn_singular(condition)
    if not failed:
        ratio = _dense_ratio(gram, rhs, solution)
        if ratio < _RESIDUAL_THRESHOLD:
            return Solved(solution, None, "cholesky", condition, ratio)
        _log.warning("Cholesky left a residual ratio of %.3g; refining further", ratio)
        solution, ratio = _refined(gram, gram, rhs, solution)
        if ratio < _RESIDUAL_THRESHOLD:
            return Solved(solution, None, "refined", condition, ratio)
    else:
        _log.warning("Cholesky met a minor of order %d that is not positive", int(info))
    values, vectors = torch.linalg.eigh(gram)
    cut = _EPS * gram.shape[0] * float(values[-1])
    if values[0] < -10 * cut or values[-1] <= 0:
        raise SingularSystemError(explain(gram, ridge, rows))
    for scale in (1.0, 10.0, 100.0):
        # The shifted matrix is only a preconditioner: refinement solves the system as it was given.
        shifted = with_ridge(gram, scale * cut)
        solution, info, _ = ops.solve_spd(shifted, rhs)
        if bool(info):
            continue
        solution, ratio = _refined(gram, shifted, rhs, solution)
        _log.warning("jitter of %.3g on the diagonal: residual ratio %.3g", scale * cut, ratio)
        if ratio < _RESIDUAL_THRESHOLD:
            return Solved(solution, None, "jitter", condition, ratio)
    kept = values > cut
    _log.warning("eigenvalue cut-off: %d of %d eigenvalues kept", int(kept.sum()), kept.numel())
    basis = vectors[:, kept]
    solution = ((rhs @ basis) / values[kept]) @ basis.mT
    ratio = _dense_ratio(gram, rhs, solution)
    return Solved(solution, None, "eigenvalue cut-off", condition, ratio)


def _refined(gram: Tensor, factored: Tensor, rhs: Tensor, solution: Tensor) -> tuple[Tensor, float]:
    """Iterative refinement of ``X gram = rhs`` with the factorisation of a nearby matrix."""
    best, best_ratio = solution, _dense_ratio(gram, rhs, solution)
    for _ in range(_REFINEMENTS):
        correction, _, _ = ops.solve_spd(factored, rhs - best @ gram)
        candidate = best + correction
        ratio = _dense_ratio(gram, rhs, candidate)
        if not ratio < best_ratio:
            break
        best, best_ratio = candidate, ratio
        if best_ratio < _RESIDUAL_THRESHOLD:
            break
    return best, best_ratio


def _warn_singular(condition: float) -> None:
    _log.warning(
        "the system is singular to working precision (condition number %.3g): the ridge is too "
        "small beside the rows, and directions they don't determine are arbitrary",
        condition,
    )


def explain(gram: Tensor, ridge: float, rows: int) -> str:
    """Says why ``gram`` can't be factored and what to do."""
    values = torch.linalg.eigvalsh(gram)
    width = gram.shape[0]
    cut = _EPS * width * float(values.abs().max())
    if float(values[0]) < -10 * cut:
        return (
            f"the normal equations are indefinite (least eigenvalue {float(values[0]):.3g}, "
            f"greatest {float(values[-1]):.3g}): a weight is negative, or more rows were taken "
            "away than had been added"
        )
    rank = int((values > cut).sum())
    return (
        f"the normal equations are singular: {rows} rows span {rank} of {width} dimensions and "
        f"ridge is {ridge:g}, so the map is not unique. Pass a positive ridge, or add preserve "
        "rows until every dimension is covered"
    )


# Norms, estimated where forming the matrix would cost as much as the solve


@lru_cache(maxsize=8)
def probes(width: int, device: torch.device) -> Tensor:
    """`[p, d]` float64 Gaussian vectors, the same at every call."""
    generator = torch.Generator("cpu").manual_seed(0)
    drawn = torch.randn(_PROBES, width, dtype=torch.float64, device="cpu", generator=generator)
    return drawn.to(device)


def _norm(times: Callable[[Tensor], Tensor], image: Tensor) -> Tensor:
    """`[...]` 2-norm of a symmetric matrix, from below: the second step of a power iteration.

    Args:
        times: gives ``rows A``.
        image: `[..., p, d]` probes times A.
    """
    return (times(image).norm(dim=-1) / image.norm(dim=-1)).amax(-1)


def residual_ratio(
    solved: Solved, times: Callable[[Tensor], Tensor], wanted: Tensor, probe: Tensor
) -> tuple[list[float], list[float]]:
    """``|XA - D|_F / (|A|_2 |X|_F eps d)``, estimated with random vectors.

    Args:
        solved: X, one or a batch.
        times: gives ``rows A``.
        wanted: `[..., p, d]` probes times ``D^T``.
        probe: `[p, d]` probes.

    Returns:
        The ratio, and the estimate of ``|A|_2``, of each system.
    """
    image = times(probe)
    norm = _norm(times, image)
    found = _ratios(solved.move(image) - wanted, solved.move(probe), norm, probe.shape[-1])
    return found, norm.reshape(-1).tolist()


def _ratios(
    error: Tensor, size: Tensor, norm: Tensor, width: int, info: Tensor | None = None
) -> list[float]:
    """Ratios from probes times ``XA - D`` and times X: their mean squares are Frobenius norms.

    Args:
        error, size: `[..., p, o]` and `[..., p, o]`.
        norm: `[...]` ``|A|_2``.
        width: d, the order of A.
        info: `[...]` not 0 where a factorisation failed.
    """
    failed = torch.zeros_like(norm) if info is None else info.to(norm)
    parts = (error.norm(dim=(-2, -1)), size.norm(dim=(-2, -1)), norm, failed)
    ratios = []
    for left_over, moved, scale, bad in torch.stack(parts, -1).reshape(-1, 4).tolist():
        limit = scale * moved * _EPS * width
        if limit > 0:
            ratio = left_over / limit
        else:
            # Where nothing moves and nothing is left over, that is as good as it gets.
            ratio = math.inf if left_over else 0.0
        ratios.append(math.inf if bad or math.isnan(ratio) else ratio)
    return ratios


def _dense_ratio(gram: Tensor, rhs: Tensor, solution: Tensor) -> float:
    """The residual ratio of a dense solution of ``X gram = rhs``."""
    probe = probes(len(gram), gram.device)
    ratios, _ = residual_ratio(Solved(solution, None), lambda v: v @ gram, probe @ rhs.mT, probe)
    return ratios[0]
