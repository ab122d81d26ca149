"""The tolerance rule: at most twice the error of PyTorch itself in the same dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from realera_fast.ops.tolerance import limits, product_error

__all__ = ["check", "product_error"]


def check(
    name: str,
    got: Tensor,
    reference: Tensor,
    torch_same_dtype: Tensor,
    *,
    floor: Tensor | None = None,
) -> None:
    """Fails where a result is worse than `realera_fast.ops.tolerance.limits` allows.

    Args:
        name: what is compared, for the message.
        got: the result under test.
        reference: float64 result, or more exact.
        torch_same_dtype: the result of plain PyTorch from the same inputs.
        floor: error that each element may have, whatever PyTorch's is.
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
    most = limits(got, exact, torch_same_dtype, floor)
    worst = int((errors - most).argmax())
    error, limit = float(errors.flatten()[worst]), float(most.flatten()[worst])
    assert error <= limit, f"{name}: error {error:.3g}, PyTorch's {plain:.3g}, limit {limit:.3g}"
