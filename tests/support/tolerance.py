"""The tolerance rule: at most twice the error of PyTorch itself in the same dtype."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def check(
    name: str,
    got: Tensor,
    reference: Tensor,
    torch_same_dtype: Tensor,
    *,
    floor: Tensor | None = None,
) -> None:
    """Fails where a result is worse than twice what PyTorch itself gets in the same dtype.

    The limit also holds the rounding of the reference, so that it is not zero where PyTorch happens
    to be exact (the rule of FlashAttention's tests). How PyTorch orders a sum is the choice of a
    BLAS for a processor, and how well that order does with a few numbers is luck: below the floor
    of what any order may err by, being worse than PyTorch is no fault.

    Args:
        name: what is compared, for the message.
        got: the result under test.
        reference: float64 result, or more exact.
        torch_same_dtype: the result of plain PyTorch from the same inputs.
        floor: error that each element may have, whatever PyTorch's is: `product_error` of the
            matrices whose product the result is, or contains as a term.
    """
    assert got.shape == reference.shape == torch_same_dtype.shape, (
        f"{name}: shape {list(got.shape)}, expected {list(reference.shape)}"
    )
    if got.numel() == 0:
        return
    assert torch.equal(got.isfinite(), reference.isfinite()), f"{name}: NaN or infinity"
    exact = reference.to(torch.float64)
    errors = (got.to(torch.float64) - exact).abs()
    plain = (torch_same_dtype.to(torch.float64) - exact).abs().max()
    if got.dtype == torch.float64:
        # The spacing of float64 at the magnitude of the reference.
        rounding = torch.finfo(torch.float64).eps * exact.abs().max()
    else:
        rounding = (exact.to(got.dtype).to(torch.float64) - exact).abs().max()
    limits = (2 * (plain + rounding)).expand_as(errors)
    if floor is not None:
        limits = limits.maximum(rounding + floor.to(errors.device))
    excess = errors - limits
    worst = int(excess.argmax())
    error, limit = float(errors.flatten()[worst]), float(limits.flatten()[worst])
    assert error <= limit, f"{name}: error {error:.3g}, PyTorch's {plain:.3g}, limit {limit:.3g}"


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
