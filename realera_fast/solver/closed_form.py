"""The closed form: one map on text embeddings that edits every text-conditioned projection at once.

For rows ``(x_i, y_i, w_i)`` the edited projection of a weight ``W`` minimises

    sum_i w_i |W' x_i - W y_i|^2 + ridge |W' - W|_F^2

(RealEra, arXiv 2410.09140, following UCE, arXiv 2308.14761). Its solution is ``W' = W T`` with
``T = I + D A^-1``, ``A = sum_i w_i x_i x_i^T + ridge I`` and ``D = sum_i w_i (y_i - x_i) x_i^T``.
Neither A nor D depends on the layer, so one factorisation serves all of them.

Two ways lead to T, and :class:`NormalEquations` takes the cheaper one:

primal    More rows than features: the `[d, d]` sums A and D are formed and A is factored.
dual      Fewer rows, `[n, d]` X and Y (weights drawn in): with A_0 the part of A that is not rows,

              T - I = (Y - X)^T G^-1 X A_0^-1,    G = I + X A_0^-1 X^T,

          which needs an `[n, n]` factorisation, and has its low rank in sight.

Three shapes are solved: one A for all layers (:meth:`NormalEquations.solve`), one A and its own
destinations for each layer (:func:`fit_values_`), and one A for each layer (:func:`solve_layers`).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from realera_fast import ops
from realera_fast.solver.concept_map import ConceptMap, check_rank_tolerance, compressed, split
from realera_fast.solver.config import check_ridge
from realera_fast.solver.least_squares import (
    Factored,
    Scaled,
    SingularSystemError,
    Solved,
    dual,
    is_good,
    primal,
    with_ridge,
)
from realera_fast.solver.rows import Pairs, Rows, WaitingRows, join_rows

_log = logging.getLogger(__name__)

_EPS = torch.finfo(torch.float64).eps


@dataclass(frozen=True)
class SolveInfo:
    """How a solve went."""

    method: str
    """What answered: "dual" (fewer rows than features), "cholesky", or "incremental" (from an
    earlier solution). Where those were not good enough, the rung of the ladder: "refined" (further
    refinement steps), "jitter" (factored with a slightly greater ridge, refined back), "eigenvalue
    cut-off". "identity" where no row moves and nothing was solved."""
    condition: float
    """Estimated condition number of A: in the 2-norm for "dual" and "incremental", else in the
    1-norm (1 for "identity"; infinity if it can't be told)."""
    residual_ratio: float
    """``|XA - D|_F / (|A|_2 |X|_F eps d)`` with X = T - I before its rank is cut; for "dual", the
    same of the `[n, n]` system if that is greater. Below 30 is as good as float64 gets. Norms are
    estimated, within a factor of about two."""
    rank: int
    """Rank k of the map."""
    dropped: float
    """Frobenius norm of what the rank cut dropped, as a fraction of that of T - I."""
    rows: int
    """Number of rows accumulated."""

    @classmethod
    def identity(cls, rows: int) -> SolveInfo:
        """Of a map that moves nothing: nothing was solved."""
        return cls(
            method="identity", condition=1.0, residual_ratio=0.0, rank=0, dropped=0.0, rows=rows
        )


@dataclass(frozen=True)
class Solution:
    """The map and how it was found."""

    map: ConceptMap
    info: SolveInfo


class NormalEquations:
    """The sums A (without ridge) and D of the closed form, in float64 and O(d^2) memory.

    Rows are kept as they are while they are fewer than features, those that move apart from those
    that stay (the dual form needs them), and are summed from then on. Sums over disjoint rows add,
    and rows can be taken back, to rounding: ``a + b`` and ``a - b``.
    """

    def __init__(self, width: int, *, device: torch.device | str = "cpu") -> None:
        if width < 1:
            raise ValueError(f"width: expected a positive number of features, got {width}")
        self.width = width
        """Number d of features of a row."""
        self.device = torch.device(device)
        self.rows = 0
        """Number of rows accumulated."""
        self._sums: tuple[Tensor, Tensor] | None = None
        self._moving, self._staying = WaitingRows(width), WaitingRows(width)

    @property
    def is_empty(self) -> bool:
        """Whether nothing was accumulated."""
        return self._sums is None and not self._moving.parts and not self._staying.parts

    @property
    def gram(self) -> Tensor:
        """`[d, d]` float64 ``sum_i w_i x_i x_i^T``."""
        return self._summed()[0]

    @property
    def cross(self) -> Tensor:
        """`[d, d]` float64 ``sum_i w_i (y_i - x_i) x_i^T``."""
        return self._summed()[1]

    def update(self, pairs: Pairs) -> NormalEquations:
        """Adds rows, moved to the accumulator's device if they are on another. Returns itself.

        Raises:
            ValueError: rows of another width, or with NaN or infinity; nothing is added then.
        """
        if pairs.source.shape[1] != self.width:
            raise ValueError(
                f"pairs: expected rows of {self.width} features, got {pairs.source.shape[1]}"
            )
        pairs.check()
        source = pairs.source.detach().to(self.device)
        destination = source
        if pairs.destination is not pairs.source:
            # The wider of both: a narrower one would round, or overflow after the check.
            dtype = torch.promote_types(source.dtype, pairs.destination.dtype)
            source = source.to(dtype)
            destination = pairs.destination.detach().to(self.device, dtype)
        pairs = Pairs(source, destination, pairs.weight.detach().to(self.device))
        moving = None
        if pairs.destination is not pairs.source:
            moving = (pairs.source != pairs.destination).any(1) & (pairs.weight != 0)
        count = 0 if moving is None else int(moving.sum())
        if moving is None or count in (0, len(moving)):
            self._take(self._moving if count else self._staying, pairs)
        else:
            self._take(self._moving, Pairs(*(tensor[moving] for tensor in pairs.tensors)))
            stay = pairs.source[~moving]
            self._take(self._staying, Pairs(stay, stay, pairs.weight[~moving]))
        self.rows += len(pairs.weight)
        return self

    def update_moments(self, gram: Tensor, cross: Tensor | None = None) -> NormalEquations:
        """Adds second moments that are known without rows, as they are. Returns itself.

        Args:
            gram: `[d, d]` symmetric, added to ``gram``.
            cross: `[d, d]` added to ``cross``, if given.
        """
        for name, moment in (("gram", gram), ("cross", cross)):
            if moment is not None and moment.shape != (self.width, self.width):
                raise ValueError(
                    f"{name}: expected shape {[self.width] * 2}, got {list(moment.shape)}"
                )
            if moment is not None and not math.isfinite(float(moment.sum())):
                raise ValueError(f"{name}: holds NaN or infinity")
        own_gram, own_cross = self._sums or self._zeros()
        own_gram += gram.to(own_gram)
        if cross is not None:
            own_cross += cross.to(own_cross)
        self._sums = own_gram, own_cross
        return self

    def scaled(self, weight: float, step: float = 1.0) -> NormalEquations:
        """The same rows with weights times `weight`, each of which goes `step` times as far."""
        result = NormalEquations(self.width, device=self.device)
        root = math.sqrt(weight)
        if self._sums is not None:
            result.update_moments(weight * self._sums[0], weight * step * self._sums[1])
        for name in ("_moving", "_staying"):
            parts = getattr(self, name).parts
            getattr(result, name).parts = [
                Rows(root * part.source, root * step * part.change) for part in parts
            ]
        result.rows = self.rows
        return result

    def __add__(self, other: NormalEquations) -> NormalEquations:
        return self._combined(other, 1)

    def __sub__(self, other: NormalEquations) -> NormalEquations:
        return self._combined(other, -1)

    def equivalent_rows(self) -> Pairs:
        """At most d rows of weight 1 with the same sums, to rounding, however many there were.

        Raises:
            ValueError: the sums are not those of rows with positive weights.
        """
        if self._sums is None:
            return join_rows((self._moving, self._staying)).pairs()
        gram, cross = self._summed()
        if not (math.isfinite(float(gram.sum())) and math.isfinite(float(cross.sum()))):
            raise ValueError("the accumulated sums hold NaN or infinity")
        values, vectors = torch.linalg.eigh(gram)
        cut = _EPS * self.width * float(values.abs().max())
        if float(values[0]) < -10 * cut:
            raise ValueError("these equations are not the sum of rows with positive weights")
        # Directions that D uses beyond its rounding are kept even where A hardly has them.
        used = (cross @ vectors).norm(dim=0)
        kept = (values > cut) | (used > _EPS * self.width * torch.linalg.matrix_norm(cross))
        root = values[kept].clamp_min(cut).sqrt()[:, None]
        basis = vectors[:, kept].mT
        # X = S^1/2 V^T has X^T X = A; (Y - X)^T X = D gives Y - X = S^-1/2 V^T D^T.
        source = root * basis
        return Pairs(source, source + (basis @ cross.mT) / root, source.new_ones(len(source)))

    def solve(
        self, *, ridge: float, rank_tolerance: float = 1e-6, dtype: torch.dtype = torch.float32
    ) -> Solution:
        """Solves for the map.

        Where the first factorisation leaves a residual that is not as small as float64 allows, a
        ladder of further refinement, jitter and eigenvalue cut-off follows; each step is logged.

        Args:
            ridge: added to the diagonal of A, not negative.
            rank_tolerance: singular values of T - I below this fraction of the greatest are
                dropped. 0 spares the decomposition and leaves the rank at the number of rows that
                move, or at d.
            dtype: of the factors of the map, float32 or float64.

        Returns:
            The map and how it was found. If no row moves, the map has rank 0 exactly.

        Raises:
            SingularSystemError: A is not positive definite to working precision.
        """
        return solve_layers([self], ridge=ridge, rank_tolerance=rank_tolerance, dtype=dtype)[0]

    def tensors(self) -> dict[str, Tensor]:
        """All that is accumulated, by name, for a checkpoint: O(d^2) numbers."""
        found: dict[str, Tensor] = {}
        if self._sums is not None:
            found |= {"gram": self._sums[0], "cross": self._sums[1]}
        for name, waiting in (("moving", self._moving), ("staying", self._staying)):
            for number, part in enumerate(waiting.parts):
                found[f"{name}.{number:06d}.source"] = part.source
                found[f"{name}.{number:06d}.change"] = part.change
        return found

    def load_tensors(self, tensors: dict[str, Tensor], rows: int) -> None:
        """Takes what `tensors` gave, in place of all that is accumulated.

        Args:
            rows: number of rows accumulated then.
        """
        values = {name: tensor.to(self.device, torch.float64) for name, tensor in tensors.items()}
        self._sums = (values["gram"], values["cross"]) if "gram" in values else None
        for name, waiting in (("moving", self._moving), ("staying", self._staying)):
            sources = sorted(k for k in values if k.startswith(f"{name}.") and k.endswith("source"))
            waiting.parts = [
                Rows(values[key], values[f"{key.removesuffix('source')}change"]) for key in sources
            ]
        self.rows = rows

    # Inside

    def _zeros(self) -> tuple[Tensor, Tensor]:
        zeros = torch.zeros(self.width, self.width, dtype=torch.float64, device=self.device)
        return zeros, zeros.clone()

    def _take(self, waiting: WaitingRows, pairs: Pairs) -> None:
        """Keeps rows, or sums them with all of their kind that wait."""
        count = len(pairs.weight)
        if not waiting.room_for(count):
            self._drain(waiting)
        if count < self.width:
            waiting.parts.append(Rows.of(pairs))
        else:
            self._sum(pairs)

    def _drain(self, waiting: WaitingRows) -> None:
        for part in waiting.parts:
            self._sum(part.pairs())
        waiting.parts = []

    def _sum(self, pairs: Pairs) -> None:
        if self._sums is None:
            self._sums = self._zeros()
        ops.normal_equations_(*self._sums, *pairs.tensors)

    def _summed(self) -> tuple[Tensor, Tensor]:
        """The sums, with rows that wait drawn in; afterwards there are none."""
        for waiting in (self._moving, self._staying):
            self._drain(waiting)
        self._sums = self._sums or self._zeros()
        return self._sums

    def _combined(self, other: NormalEquations, sign: int) -> NormalEquations:
        if not isinstance(other, NormalEquations):
            return NotImplemented
        if other.width != self.width:
            raise ValueError(f"other: expected a width of {self.width}, got {other.width}")
        result = NormalEquations(self.width, device=self.device)
        for part, factor in ((self, 1), (other, sign)):
            if part._sums is not None:
                result.update_moments(factor * part._sums[0], factor * part._sums[1])
            for name in ("_moving", "_staying"):
                kept = getattr(result, name)
                for rows in getattr(part, name).parts:
                    if factor > 0 and kept.room_for(len(rows.source)):
                        kept.parts.append(rows)
                    else:
                        result._sum(rows.pairs(factor))
        result.rows = self.rows + sign * other.rows
        return result

    @property
    def moves(self) -> bool:
        """Whether any row moves."""
        return bool(self._moving.parts) or (self._sums is not None and bool(self._sums[1].any()))

    def _few(self) -> Rows | None:
        """Everything as rows, where that is the cheapest way: nothing summed, few that stay."""
        stay = len(self._staying)
        few = self._sums is None and 4 * stay <= self.width > stay + len(self._moving)
        return join_rows((self._moving, self._staying)) if few else None

    def _few_moving(self) -> Rows | None:
        """The rows that move, if they are few and wait; those that stay are summed then."""
        if not self._moving.parts or 2 * len(self._moving) > self.width:
            return None
        if self._sums is not None and bool(self._sums[1].any()):
            return None
        self._drain(self._staying)
        return join_rows((self._moving,))


def solve_layers(
    equations: Sequence[NormalEquations],
    *,
    ridge: float,
    rank_tolerance: float = 1e-6,
    dtype: torch.dtype = torch.float32,
) -> list[Solution]:
    """Solves one system for each layer (or group of layers), batched where they are alike.

    For denoisers whose layers see different text inputs. Systems of equally many rows, fewer than
    features and with nothing but rows, are one batch.

    Args:
        equations: a system for each layer, all of one width and on one device.
        ridge, rank_tolerance, dtype: as in :meth:`NormalEquations.solve`.

    Returns:
        A solution for each; ``ops.low_rank_update_(weights, [s.map.left ...], [s.map.right ...])``
        applies them.

    Raises:
        SingularSystemError: a system is not positive definite; with several, its number is named.
    """
    check_ridge(ridge)
    check_options(rank_tolerance, dtype)
    if len({(e.width, e.device) for e in equations}) > 1:
        raise ValueError("equations: expected systems of one width and on one device")
    found: list[Solution | None] = [None] * len(equations)
    batches: dict[int, list[int]] = {}
    rows: dict[int, Rows] = {}
    for i, system in enumerate(equations):
        if not system.moves:
            nothing = ConceptMap.identity(system.width, device=system.device, dtype=dtype)
            found[i] = Solution(nothing, SolveInfo.identity(system.rows))
        elif ridge > 0 and (few := system._few()) is not None:
            rows[i] = few
            # A batch saves launches, which a GPU has to fear; elsewhere it is only copied for it.
            alike = len(rows[i].source) if system.device.type == "cuda" else -i
            batches.setdefault(alike, []).append(i)
    for members in batches.values():
        x, change = rows[members[0]].source, rows[members[0]].change
        if len(members) > 1:
            x = torch.stack([rows[i].source for i in members])
            change = torch.stack([rows[i].change for i in members])
        for i, solved in zip(members, dual(x, change, Scaled(ridge)), strict=True):
            if is_good(solved):
                found[i] = finish(solved, equations[i].rows, rank_tolerance, dtype)
    for i, system in enumerate(equations):
        if found[i] is None:
            try:
                found[i] = _solve_alone(system, ridge, rank_tolerance, dtype)
            except SingularSystemError as error:
                if len(equations) == 1:
                    raise
                raise SingularSystemError(f"equations[{i}]: {error}") from None
    return [solution for solution in found if solution is not None]


# Inside


def _solve_alone(
    system: NormalEquations, ridge: float, rank_tolerance: float, dtype: torch.dtype
) -> Solution:
    """One system that is not of a batch: rows on top of moments, or sums."""
    rows = system._few_moving()
    if rows is not None:
        gram = system._sums[0] if system._sums is not None else system._zeros()[0]
        base = Factored(with_ridge(gram, ridge))
        if base.usable:
            solved = dual(rows.source, rows.change, base)[0]
            if is_good(solved):
                return finish(solved, system.rows, rank_tolerance, dtype)
    gram, cross = system.gram, system.cross
    solved = primal(with_ridge(gram, ridge), cross, ridge, system.rows)
    return finish(solved, system.rows, rank_tolerance, dtype)


def finish(solved: Solved, rows: int, rank_tolerance: float, dtype: torch.dtype) -> Solution:
    """Cuts the rank and rounds the factors."""
    left, right, dropped = solved.left, solved.right, 0.0
    if right is None:
        if rank_tolerance > 0:
            left, right, dropped = split(left, rank_tolerance)
        else:
            right = torch.eye(left.shape[0], dtype=left.dtype, device=left.device)
    elif rank_tolerance > 0:
        left, right, dropped = compressed(left, right, rank_tolerance)
    concept_map = ConceptMap(left.to(dtype).contiguous(), right.to(dtype).contiguous())
    info = SolveInfo(
        method=solved.method,
        condition=solved.condition,
        residual_ratio=solved.residual_ratio,
        rank=concept_map.rank,
        dropped=dropped,
        rows=rows,
    )
    _log.debug("closed form: %s", info)
    return Solution(concept_map, info)


def check_options(rank_tolerance: float, dtype: torch.dtype) -> None:
    """Raises ValueError unless a solve can be cut and rounded so."""
    check_rank_tolerance(rank_tolerance)
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"dtype: expected torch.float32 or torch.float64, got {dtype}")
