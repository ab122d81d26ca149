"""The answer of the closed form in its smallest shape: ``T = I + left @ right``.

``W T x = W (T x)``: the map edits every projection of a text embedding at once, and it can be
applied to the embedding itself instead. Two of them compose to a third.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from realera_fast.runtime import full_precision

_EPS = torch.finfo(torch.float64).eps
RANGE_START = 64
"""First number of probes of the randomised range finder; doubled while the rank is higher."""


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
    def identity(
        cls,
        width: int,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> ConceptMap:
        """The map of rank 0 on embeddings of ``width`` features, which moves nothing."""
        left = torch.zeros(width, 0, device=device, dtype=dtype)
        return cls(left, left.mT.contiguous())

    @property
    def rank(self) -> int:
        """Number k of columns of ``left``."""
        return self.left.shape[1]

    @property
    def width(self) -> int:
        """Number d of features of an embedding."""
        return self.left.shape[0]

    @property
    @full_precision()
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
        dtype = torch.promote_types(embeddings.dtype, self.left.dtype)
        x = embeddings.to(dtype)
        left = self.left.to(x.device, dtype)
        right = self.right.to(x.device, dtype)
        # As in `full_precision`, in the way that torch.compile knows.
        kind = x.device.type if torch.amp.is_autocast_available(x.device.type) else "cpu"
        with torch.autocast(kind, enabled=False):
            return (x + (x @ right.mT) @ left.mT).to(embeddings.dtype)

    def to(self, target: torch.device | str | torch.dtype) -> ConceptMap:
        """The same map with its factors on another device or in another dtype."""
        return ConceptMap(self.left.to(target), self.right.to(target))

    @full_precision()
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
        found = compressed(self.left, self.right, tolerance)
        return ConceptMap(found.left.to(self.left.dtype), found.right.to(self.left.dtype))


def check_rank_tolerance(tolerance: float) -> None:
    """Raises ValueError unless it is a fraction below 1."""
    if not 0 <= tolerance < 1:
        raise ValueError(
            f"rank_tolerance: expected a number from 0 to less than 1, got {tolerance}"
        )


class LowRank(NamedTuple):
    """Balanced factors of a matrix whose rank was cut."""

    left: Tensor
    """`[d, k]` float64."""
    right: Tensor
    """`[k, d]` float64."""
    dropped: float
    """Frobenius norm of what was dropped, as a fraction of the whole."""


@full_precision()
def compressed(left: Tensor, right: Tensor, tolerance: float) -> LowRank:
    """Balanced factors of ``left @ right`` of the least rank.

    Args:
        left: `[d, k]` any floating dtype; computed in float64.
        right: `[k, d]`.
        tolerance: singular values at or below this fraction of the greatest are dropped.
    """
    check_rank_tolerance(tolerance)
    left, right = left.to(torch.float64), right.to(torch.float64)
    if left.shape[1] >= left.shape[0]:
        return split(left @ right, tolerance)
    if left.shape[1] == 0:
        return LowRank(left, right, 0.0)
    # left @ right = Q_l (R_l R_r^T) Q_r^T: the decomposition of the small core is enough.
    q_left, r_left = torch.linalg.qr(left)
    q_right, r_right = torch.linalg.qr(right.mT)
    u, s, vh = torch.linalg.svd(r_left @ r_right.mT, full_matrices=False)
    # What is left of parts that cancel is rounding, not a direction.
    noise = left.shape[1] * _EPS * float(r_left.norm() * r_right.norm())
    kept = min(_kept(s, tolerance), int((s > noise).sum()))
    root = s[:kept].sqrt()
    dropped = float(s[kept:].norm() / s.norm()) if kept < len(s) and bool(s.any()) else 0.0
    return LowRank(q_left @ (u[:, :kept] * root), (root[:, None] * vh[:kept]) @ q_right.mT, dropped)


def split(update: Tensor, tolerance: float) -> LowRank:
    """Splits a dense ``T - I`` into balanced low-rank factors.

    Args:
        update: `[d, d]` float64.
        tolerance: singular values at or below this fraction of the greatest are dropped.
    """
    u, s, vh, residual = _decomposed(update, tolerance)
    kept = _kept(s, tolerance)
    root = s[:kept].sqrt()
    whole = float(torch.linalg.matrix_norm(update))
    dropped = (
        math.hypot(float(torch.linalg.vector_norm(s[kept:])), residual) / whole if whole else 0.0
    )
    return LowRank(u[:, :kept] * root, root[:, None] * vh[:kept], dropped)


def _kept(singular: Tensor, tolerance: float) -> int:
    """Number of singular values above ``tolerance`` times the greatest; zeros never count."""
    if singular.numel() == 0:
        return 0
    return int(((singular > tolerance * singular[0]) & (singular > 0)).sum())


class _Decomposition(NamedTuple):
    """U, S and V^T, and the Frobenius norm of what they don't hold."""

    u: Tensor
    s: Tensor
    vh: Tensor
    residual: float


def _decomposed(update: Tensor, tolerance: float) -> _Decomposition:
    """Singular value decomposition that is cheap where the rank is low, and checked.

    A randomised range finder (Halko, Martinsson, Tropp 2011, algorithm 4.1) with its residual
    measured, not estimated: it is accepted only where that is far below the rank cut, so no
    singular value that should be kept can have been missed. Otherwise the plain decomposition.
    """
    width = update.shape[0]
    generator = torch.Generator("cpu").manual_seed(0)
    probes = RANGE_START
    while tolerance > 0 and 4 * probes <= width:
        noise = torch.randn(
            update.shape[1], probes, dtype=update.dtype, device="cpu", generator=generator
        )
        basis, _ = torch.linalg.qr(update @ noise.to(update.device))
        small = basis.mT @ update
        residual = float(torch.linalg.matrix_norm(update - basis @ small))
        u, s, vh = torch.linalg.svd(small, full_matrices=False)
        if residual <= 0.01 * tolerance * float(s[0]):
            return _Decomposition(basis @ u, s, vh, residual)
        probes *= 2
    u, s, vh = torch.linalg.svd(update, full_matrices=False)
    return _Decomposition(u, s, vh, 0.0)
