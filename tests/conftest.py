"""What every test shares: interpreter, seed, poisoned memory, devices, the tolerance rule."""

from __future__ import annotations

import os
from collections.abc import Iterator

import torch

if not torch.cuda.is_available():
    # Without a GPU Triton's kernels run in its interpreter; it reads this when first imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
from torch import Tensor


def check(name: str, got: Tensor, reference: Tensor, torch_same_dtype: Tensor) -> None:
    """Fails where a result is worse than twice what PyTorch itself gets in the same dtype.

    The limit also holds the rounding of the reference, so that it is not zero where PyTorch happens
    to be exact (the rule of FlashAttention's tests).

    Args:
        name: what is compared, for the message.
        got: the result under test.
        reference: float64 result, or more exact.
        torch_same_dtype: the result of plain PyTorch from the same inputs.
    """
    assert got.shape == reference.shape == torch_same_dtype.shape, (
        f"{name}: shape {list(got.shape)}, expected {list(reference.shape)}"
    )
    if got.numel() == 0:
        return
    assert torch.equal(got.isfinite(), reference.isfinite()), f"{name}: NaN or infinity"
    exact = reference.to(torch.float64)
    error = (got.to(torch.float64) - exact).abs().max()
    plain = (torch_same_dtype.to(torch.float64) - exact).abs().max()
    if got.dtype == torch.float64:
        # The spacing of float64 at the magnitude of the reference.
        rounding = torch.finfo(torch.float64).eps * exact.abs().max()
    else:
        rounding = (exact.to(got.dtype).to(torch.float64) - exact).abs().max()
    limit = 2 * (plain + rounding)
    assert error <= limit, f"{name}: error {error:.3g}, PyTorch's {plain:.3g}, limit {limit:.3g}"


@pytest.fixture(
    params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)],
)
def device(request: pytest.FixtureRequest) -> torch.device:
    """Every device the library serves."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def seed() -> None:
    """The same random numbers for a test, whichever others run."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fills fresh memory with NaN, in C++ as well, so that reading it before writing shows."""
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
