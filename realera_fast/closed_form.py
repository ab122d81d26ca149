"""The closed form: one map on text embeddings that edits every text-conditioned projection at once.

For rows ``(x_i, y_i, w_i)`` the edited projection of a weight ``W`` minimises

    sum_i w_i |W' x_i - W y_i|^2 + ridge |W' - W|_F^2

(RealEra, arXiv 2410.09140, following UCE, arXiv 2308.14761). Its solution is ``W' = W T`` with
``T = I + D A^-1``, ``A = sum_i w_i x_i x_i^T + ridge I`` and ``D = sum_i w_i (y_i - x_i) x_i^T``.
Neither A nor D depends on the layer, so one factorisation serves all of them, and only rows that
move contribute to D, so ``T - I`` has low rank.

:class:`NormalEquations` accumulates A and D; :class:`ConceptMap` is the answer in its smallest
form.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from realera_fast import ops

_log = logging.getLogger(__name__)

_EPS = torch.finfo(torch.float64).eps
_RESIDUAL_THRESHOLD = 30.0
"""LAPACK's own test suite accepts a solution whose residual ratio is below this (``dtest.in``)."""
_REFINEMENTS = 5
"""Further refinement steps before the solver changes its method. LAPACK's ``porfs`` takes five."""
_RANGE_START = 64
"""First number of probes of the randomised range finder; doubled while the rank is higher."""


class SingularSystemError(ValueError):
    """The normal equations have no unique solution. The message says why and what to do."""


@dataclass(frozen=True, eq=False)
class Pairs:
    """Weighted rows ``(source, destination)``: where the map should send which embedding."""

    source: Tensor
    """`[n, d]` embedding rows x."""
    destination: Tensor
    """`[n, d]` rows y, where x should go. Equal to ``source`` for rows that keep their place."""
    weight: Tensor
    """`[n]` weights w, not negative."""

    def __post_init__(self) -> None:
        if self.source.dim() != 2:
            raise ValueError(f"source: expected shape [n, d], got {list(self.source.shape)}")
        if self.destination.shape != self.source.shape:
            raise ValueError(
                f"destination: expected shape {list(self.source.shape)} like source, "
                f"got {list(self.destination.shape)}"
            )
        if self.weight.shape != self.source.shape[:1]:
            raise ValueError(
                f"weight: expected shape [{self.source.shape[0]}] (one for each row of source), "
                f"got {list(self.weight.shape)}"
            )


@dataclass(frozen=True, kw_only=True)
class ClosedFormConfig:
    """Options of the closed form."""

    ridge: float = 1e-3
    """Weight of ``|W' - W|_F^2`` in the objective, as a fraction of the mean squared entry of a
    preserved row, so that it means the same for every text encoder. Greater is gentler. Default
    (ours): UCE's 0.5 beside one row of CLIP ViT-L/14 (squared length about 780) is 0.5 in the units
    of that row's mean squared entry, and holds one vector a concept; here a vocabulary holds."""
    rank_tolerance: float = 1e-6
    """Singular values of T - I below this fraction of the greatest are dropped; no unit. Default
    is ours: about ten roundings of float32, the precision the factors are stored in."""

    def __post_init__(self) -> None:
        _check_options(self.ridge, self.rank_tolerance)


@dataclass(frozen=True, eq=False)
class ConceptMap:
    """The linear map ``T = I + left @ right`` on text embeddings."""

    left: Tensor
    """`[d, k]` float32 (or float64)."""
    right: Tensor
    """`[k, d]`, of the same dtype."""

    def __post_init__(self) -> None:
        left, right = self.left, self.right
        if left.dim() != 2 or right.shape != left.shape[::-1]:
            raise ValueError(
                "left, right: expected shapes [d, k] and [k, d], "
                f"got {list(left.shape)} and {list(right.shape)}"
            )
        if left.dtype not in (torch.float32, torch.float64) or right.dtype != left.dtype:
            raise ValueError(
                f"left, right: expected float32 or float64, both alike, got {left.dtype} "
                f"and {right.dtype}"
            )

    @classmethod
    def identity(cls, width: int, *, device: torch.device | str = "cpu") -> ConceptMap:
        """The map of rank 0 on embeddings of ``width`` features, which moves nothing."""
        return cls(torch.zeros(width, 0, device=device), torch.zeros(0, width, device=device))

    @property
    def rank(self) -> int:
        """Number k of columns of ``left``."""
        return self.left.shape[1]

    @property
    def width(self) -> int:
        """Number d of features of an embedding."""
        return self.left.shape[0]

    @property
    def matrix(self) -> Tensor:
        """`[d, d]` the dense T, for tests and inspection."""
        eye = torch.eye(self.width, dtype=self.left.dtype, device=self.left.device)
        return eye + self.left @ self.right

    def __call__(self, embeddings: Tensor) -> Tensor:
        """Maps embeddings: ``x T^T`` for rows x.

        ``W T x = W (T x)``, so this on the prompt embedding equals the edit of the weights.

        Args:
            embeddings: `[..., d]` of any floating dtype.

        Returns:
            `[..., d]` of the same dtype; computed in the dtype of the factors, or a wider one.
        """
        if embeddings.shape[-1:] != (self.width,):
            raise ValueError(
                f"embeddings: expected shape [..., {self.width}], got {list(embeddings.shape)}"
            )
        if self.rank == 0:
            return embeddings
        dtype = torch.promote_types(embeddings.dtype, self.left.dtype)
        x = embeddings.to(dtype)
        left = self.left.to(x.device, dtype)
        right = self.right.to(x.device, dtype)
        return (x + (x @ right.mT) @ left.mT).to(embeddings.dtype)

    def to(self, device: torch.device | str) -> ConceptMap:
        """The same map with its factors on ``device``."""
        return ConceptMap(self.left.to(device), self.right.to(device))

    def compose(self, other: ConceptMap) -> ConceptMap:
        """This map, then ``other``: ``T_other T_self``, of rank ``k_self + k_other``."""
        if other.width != self.width:
            raise ValueError(f"other: expected a map of width {self.width}, got {other.width}")
        # (I + L2 R2)(I + L1 R1) = I + [L1 + L2 (R2 L1), L2] [R1; R2]
        left = torch.cat((self.left + other.left @ (other.right @ self.left), other.left), 1)
        return ConceptMap(left, torch.cat((self.right, other.right), 0))

    def compressed(self, tolerance: float = 1e-6) -> ConceptMap:
        """The same map without singular values of T - I below ``tolerance`` times the greatest.

        Args:
            tolerance: fraction of the greatest singular value, from 0 to less than 1.
        """
        _check_options(0.0, tolerance)
        if self.rank == 0:
            return self
        # T - I = Q_l (R_l R_r^T) Q_r^T: the decomposition of the small core is enough.
        q_left, r_left = torch.linalg.qr(self.left.to(torch.float64))
        q_right, r_right = torch.linalg.qr(self.right.mT.to(torch.float64))
        u, s, vh = torch.linalg.svd(r_left @ r_right.mT, full_matrices=False)
        # What is left of parts that cancel is rounding, not a direction.
        noise = self.rank * _EPS * float(r_left.norm() * r_right.norm())
        kept = min(_kept(s, tolerance), int((s > noise).sum()))
        root = s[:kept].sqrt()
        left = q_left @ (u[:, :kept] * root)
        right = (root[:, None] * vh[:kept]) @ q_right.mT
        return ConceptMap(left.to(self.left.dtype), right.to(self.left.dtype))


@dataclass(frozen=True)
class SolveInfo:
    """How a solve went."""

    method: str
    """The rung of the ladder that answered: "cholesky", "refined" (further refinement steps),
    "jitter" (factored with a slightly greater ridge, refined back), "eigenvalue cut-off"; or
    "identity" where no row moves and nothing was solved."""
    condition: float
    """Estimated 1-norm condition number of A (1 for "identity"; infinity if it can't be told)."""
    residual_ratio: float
    """``|XA - D| / (|A| |X| eps d)`` in the infinity norm; below 30 is as good as float64 gets."""
    rank: int
    """Rank k of the map."""
    dropped: float
    """Frobenius norm of what the rank cut dropped, as a fraction of that of T - I."""
    rows: int
    """Number of rows accumulated."""


@dataclass(frozen=True)
class Solution:
    """The map and how it was found."""

    map: ConceptMap
    info: SolveInfo


class NormalEquations:
    """Accumulates the sums A (without ridge) and D of the closed form, in float64.

    Sums over disjoint rows add, and rows can be taken back: ``a + b`` and ``a - b``.
    """

    def __init__(self, width: int, *, device: torch.device | str = "cpu") -> None:
        if width < 1:
            raise ValueError(f"width: expected a positive number of features, got {width}")
        self.gram = torch.zeros(width, width, dtype=torch.float64, device=device)
        """`[d, d]` float64 ``sum_i w_i x_i x_i^T``."""
        self.cross = torch.zeros(width, width, dtype=torch.float64, device=device)
        """`[d, d]` float64 ``sum_i w_i (y_i - x_i) x_i^T``."""
        self.rows = 0
        """Number of rows accumulated."""

    @property
    def width(self) -> int:
        """Number d of features of a row."""
        return self.gram.shape[0]

    def update(self, pairs: Pairs) -> NormalEquations:
        """Adds rows, moved to the accumulator's device if they are on another. Returns itself."""
        if pairs.source.shape[1] != self.width:
            raise ValueError(
                f"pairs: expected rows of {self.width} features, got {pairs.source.shape[1]}"
            )
        device = self.gram.device
        ops.normal_equations_(
            self.gram,
            self.cross,
            pairs.source.to(device),
            pairs.destination.to(device, pairs.source.dtype),
            pairs.weight.to(device),
        )
        self.rows += pairs.source.shape[0]
        return self

    def update_moments(self, gram: Tensor, cross: Tensor | None = None) -> NormalEquations:
        """Adds second moments that are known without rows, as they are. Returns itself.

        Args:
            gram: `[d, d]` symmetric, added to ``gram``.
            cross: `[d, d]` added to ``cross``, if given.
        """
        for name, moment in (("gram", gram), ("cross", cross)):
            if moment is not None and moment.shape != self.gram.shape:
                raise ValueError(
                    f"{name}: expected shape {list(self.gram.shape)}, got {list(moment.shape)}"
                )
        self.gram += gram.to(self.gram)
        if cross is not None:
            self.cross += cross.to(self.cross)
        return self

    def __add__(self, other: NormalEquations) -> NormalEquations:
        return self._combined(other, 1)

    def __sub__(self, other: NormalEquations) -> NormalEquations:
        return self._combined(other, -1)

    def _combined(self, other: NormalEquations, sign: int) -> NormalEquations:
        if not isinstance(other, NormalEquations):
            return NotImplemented
        if other.width != self.width:
            raise ValueError(f"other: expected a width of {self.width}, got {other.width}")
        result = NormalEquations(self.width, device=self.gram.device)
        result.gram = self.gram + sign * other.gram.to(self.gram.device)
        result.cross = self.cross + sign * other.cross.to(self.cross.device)
        result.rows = self.rows + sign * other.rows
        return result

    def solve(
        self, *, ridge: float, rank_tolerance: float = 1e-6, dtype: torch.dtype = torch.float32
    ) -> Solution:
        """Solves for the map.

        Cholesky factorisation first. Where its residual is not as small as float64 allows, a
        ladder of further refinement, jitter and eigenvalue cut-off follows; each step is logged.

        Args:
            ridge: added to the diagonal of A, not negative.
            rank_tolerance: singular values of T - I below this fraction of the greatest are
                dropped.
            dtype: of the factors of the map, float32 or float64.

        Returns:
            The map and how it was found. If no row moves, the map has rank 0 exactly.

        Raises:
            SingularSystemError: A is not positive definite to working precision.
        """
        _check_options(ridge, rank_tolerance)
        if not (self.gram.isfinite().all() and self.cross.isfinite().all()):
            raise ValueError(
                "the accumulated rows or weights hold NaN or infinity; check the text encoder's "
                "output and its dtype"
            )
        if not self.cross.any():
            identity = ConceptMap.identity(self.width, device=self.gram.device)
            identity = ConceptMap(identity.left.to(dtype), identity.right.to(dtype))
            return Solution(identity, SolveInfo("identity", 1.0, 0.0, 0, 0.0, self.rows))
        gram = self.gram.clone()
        gram.diagonal().add_(ridge)
        update, method, condition, ratio = _solve(gram, self.cross, ridge, self.rows)
        left, right, dropped = _factors(update, rank_tolerance)
        concept_map = ConceptMap(left.to(dtype).contiguous(), right.to(dtype).contiguous())
        info = SolveInfo(method, condition, ratio, concept_map.rank, dropped, self.rows)
        _log.debug("closed form: %s", info)
        return Solution(concept_map, info)


def _check_options(ridge: float, rank_tolerance: float) -> None:
    if not 0 <= ridge < math.inf:
        raise ValueError(f"ridge: expected a finite number of at least 0, got {ridge}")
    if not 0 <= rank_tolerance < 1:
        raise ValueError(
            f"rank_tolerance: expected a number from 0 to less than 1, got {rank_tolerance}"
        )


def _solve(gram: Tensor, rhs: Tensor, ridge: float, rows: int) -> tuple[Tensor, str, float, float]:
    """Climbs the ladder until a solution of ``X gram = rhs`` has a small residual.

    Returns:
        `[d, d]` X, the method, the condition estimate, the residual ratio.
    """
    solution, info, reciprocal = ops.solve_spd(gram, rhs)
    failed, rcond = bool(info), float(reciprocal)
    condition = 1 / rcond if rcond > 0 else math.inf
    if ridge == 0 and (failed or rcond < _EPS * gram.shape[0]):
        raise SingularSystemError(_explain(gram, ridge, rows))
    if rcond < _EPS:
        _log.warning(
            "the system is singular to working precision (reciprocal condition %.3g): the ridge of "
            "%.3g is too small beside the rows, and directions they don't cover are arbitrary",
            rcond,
            ridge,
        )
    if not failed:
        ratio = _residual_ratio(gram, rhs, solution)
        if ratio < _RESIDUAL_THRESHOLD:
            return solution, "cholesky", condition, ratio
        _log.warning("Cholesky left a residual ratio of %.3g; refining further", ratio)
        solution, ratio = _refined(gram, gram, rhs, solution)
        if ratio < _RESIDUAL_THRESHOLD:
            return solution, "refined", condition, ratio
    else:
        _log.warning("Cholesky met a minor of order %d that is not positive", int(info))
    values, vectors = torch.linalg.eigh(gram)
    cut = _EPS * gram.shape[0] * float(values[-1])
    if values[0] < -10 * cut or values[-1] <= 0:
        raise SingularSystemError(_explain(gram, ridge, rows))
    for scale in (1.0, 10.0, 100.0):
        # The shifted matrix is only a preconditioner: refinement solves the system as it was given.
        shifted = gram.clone()
        shifted.diagonal().add_(scale * cut)
        solution, info, _ = ops.solve_spd(shifted, rhs)
        if bool(info):
            continue
        solution, ratio = _refined(gram, shifted, rhs, solution)
        _log.warning("jitter of %.3g on the diagonal: residual ratio %.3g", scale * cut, ratio)
        if ratio < _RESIDUAL_THRESHOLD:
            return solution, "jitter", condition, ratio
    kept = values > cut
    _log.warning("eigenvalue cut-off: %d of %d eigenvalues kept", int(kept.sum()), kept.numel())
    basis = vectors[:, kept]
    solution = ((rhs @ basis) / values[kept]) @ basis.mT
    return solution, "eigenvalue cut-off", condition, _residual_ratio(gram, rhs, solution)


def _refined(gram: Tensor, factored: Tensor, rhs: Tensor, solution: Tensor) -> tuple[Tensor, float]:
    """Iterative refinement of ``X gram = rhs`` with the factorisation of a nearby matrix."""
    best, best_ratio = solution, _residual_ratio(gram, rhs, solution)
    for _ in range(_REFINEMENTS):
        correction, _, _ = ops.solve_spd(factored, rhs - best @ gram)
        candidate = best + correction
        ratio = _residual_ratio(gram, rhs, candidate)
        if not ratio < best_ratio:
            break
        best, best_ratio = candidate, ratio
        if best_ratio < _RESIDUAL_THRESHOLD:
            break
    return best, best_ratio


def _residual_ratio(gram: Tensor, rhs: Tensor, solution: Tensor) -> float:
    """``|XA - B| / (|A| |X| eps d)`` in the infinity norm (LAPACK's ``pot02``; A is symmetric)."""
    residual = torch.linalg.matrix_norm(solution @ gram - rhs, math.inf)
    scale = torch.linalg.matrix_norm(gram, math.inf) * torch.linalg.matrix_norm(solution, math.inf)
    ratio = float(residual / (scale * _EPS * gram.shape[0]))
    return ratio if not math.isnan(ratio) else math.inf


def _explain(gram: Tensor, ridge: float, rows: int) -> str:
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


def _kept(singular: Tensor, tolerance: float) -> int:
    """Number of singular values above ``tolerance`` times the greatest; zeros never count."""
    if singular.numel() == 0:
        return 0
    return int(((singular > tolerance * singular[0]) & (singular > 0)).sum())


def _factors(update: Tensor, tolerance: float) -> tuple[Tensor, Tensor, float]:
    """Splits ``T - I`` into balanced thin factors.

    Args:
        update: `[d, d]` float64.
        tolerance: singular values at or below this fraction of the greatest are dropped.

    Returns:
        `[d, k]` left, `[k, d]` right, and the dropped Frobenius norm as a fraction of the whole.
    """
    u, s, vh, residual = _decomposed(update, tolerance)
    kept = _kept(s, tolerance)
    root = s[:kept].sqrt()
    whole = float(torch.linalg.matrix_norm(update))
    dropped = (
        math.hypot(float(torch.linalg.vector_norm(s[kept:])), residual) / whole if whole else 0.0
    )
    return u[:, :kept] * root, root[:, None] * vh[:kept], dropped


def _decomposed(update: Tensor, tolerance: float) -> tuple[Tensor, Tensor, Tensor, float]:
    """Singular value decomposition that is cheap where the rank is low, and checked.

    A randomised range finder (Halko, Martinsson, Tropp 2011, algorithm 4.1) with its residual
    measured, not estimated: it is accepted only where that is far below the rank cut, so no
    singular value that should be kept can have been missed. Otherwise the plain decomposition.

    Returns:
        U, S, V^T and the Frobenius norm of what they don't hold.
    """
    width = update.shape[0]
    generator = torch.Generator().manual_seed(0)
    probes = _RANGE_START
    while tolerance > 0 and 4 * probes <= width:
        noise = torch.randn(width, probes, dtype=update.dtype, generator=generator)
        basis, _ = torch.linalg.qr(update @ noise.to(update.device))
        small = basis.mT @ update
        residual = float(torch.linalg.matrix_norm(update - basis @ small))
        u, s, vh = torch.linalg.svd(small, full_matrices=False)
        if residual <= 0.01 * tolerance * float(s[0]):
            return basis @ u, s, vh, residual
        probes *= 2
    u, s, vh = torch.linalg.svd(update, full_matrices=False)
    return u, s, vh, 0.0
