"""How far a kernel may be from the definition of its operation: the house rule."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def limits(got: Tensor, exact: Tensor, plain: Tensor, floor: Tensor | None = None) -> Tensor:
    """The error that each element of a result may have: twice that of PyTorch in the same dtype.

    The limit also holds the rounding of the exact result, so that it is not zero where PyTorch
    happens to be exact (the rule of FlashAttention's tests). How PyTorch orders a sum is the choice
    of a BLAS for a processor, and how well that order does with a few numbers is luck: below the
    floor of what any order may err by, being worse than PyTorch is no fault.

    Args:
        got: the result that is judged; its dtype alone is read.
        exact: float64 result, or more exact, not empty.
        plain: the result of plain PyTorch from the same inputs in the same dtype.
        floor: error that each element may have, whatever PyTorch's is: `product_error` of the
            matrices whose product the result is, or contains as a term.

    Returns:
        Float64, shaped like ``exact`` and on its device.
    """
    exact = exact.to(torch.float64)
    error = (plain.to(torch.float64) - exact).abs().max()
    if got.dtype == torch.float64:
        # The spacing of float64 at the magnitude of the exact result.
        rounding = torch.finfo(torch.float64).eps * exact.abs().max()
    else:
        rounding = (exact.to(got.dtype).to(torch.float64) - exact).abs().max()
    most = (2 * (error + rounding)).expand_as(exact)
    return most if floor is None else most.maximum(rounding + floor.to(exact.device))


def product_error(*factors: Tensor) -> Tensor:
    """What the elements of a product of matrices err by, whatever the order of their sums.

    ``sqrt(n) eps |A| |B| ...`` for sums of n terms altogether. Worst of all is n in place of
    sqrt(n); rounding errors don't conspire (Higham and Mary, SIAM J. Sci. Comput. 41, 2019). Eps is
    that of the widest factor, and at least of float32, in which 16-bit numbers are summed.
    """
    dtype = torch.float32
    magnitude = factors[0].to(torch.float64).abs()
    for factor in factors:
        dtype = torch.promote_types(dtype, factor.dtype)
    for factor in factors[1:]:
        magnitude = magnitude @ factor.to(torch.float64).abs()
    terms = sum(factor.shape[0] for factor in factors[1:])
    return math.sqrt(terms) * torch.finfo(dtype).eps * magnitude
