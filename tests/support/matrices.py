"""Matrices for tests of linear algebra, and what their products and solutions may err by."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def exact_matmul(a: Tensor, b: Tensor) -> Tensor:
    """A product in extended precision, rounded once to float64."""
    wide = a.cpu().double().numpy().astype(np.longdouble) @ b.cpu().double().numpy().astype(
        np.longdouble
    )
    return torch.from_numpy(wide.astype(np.float64))


def spd(d: int, device: torch.device, condition: float = 1e3) -> Tensor:
    """`[d, d]` symmetric positive definite matrix of a given condition number."""
    basis, _ = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64, device=device))
    values = torch.logspace(0, -np.log10(condition), d, dtype=torch.float64, device=device)
    gram = (basis * values) @ basis.mT
    return (gram + gram.mT) / 2


def residual_factors(solution: Tensor, gram: Tensor) -> tuple[Tensor, ...]:
    """What the residual of Cholesky's method is a product of, as far as its rounding goes.

    The method solves a system within some eps ``|L| |L^T|`` of the given one (Higham, Accuracy and
    Stability of Numerical Algorithms, theorem 10.4), with sums of up to d terms three times: in the
    factorisation and in two solves.
    """
    factor = torch.linalg.cholesky(gram)
    once = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    return solution, factor, factor.mT, once
