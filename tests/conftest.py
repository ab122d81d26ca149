"""What every test shares: interpreter, seed, poisoned memory, devices, the tolerance rule."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch

if not torch.cuda.is_available():
    # Without a GPU Triton's kernels run in its interpreter; it reads this when first imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
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


TILE_SETS = ("baseline", "avx2", "avx512")


def tile_sets() -> list[str]:
    """The sets of native loops that this processor has instructions for; none if none is built."""
    from realera_fast import ops  # noqa: F401

    namespace = torch.ops.realera_fast
    return namespace._tile_sets() if hasattr(namespace, "_tile_sets") else []


@contextmanager
def using_tiles(name: str) -> Iterator[None]:
    """Native loops of an instruction set in place of the processor's best; skips without it."""
    found = tile_sets()
    if not found and name == "baseline":
        # Not built: the reference serves, once.
        yield
        return
    if name not in found:
        pytest.skip(f"no loops for {name} here")
    before = torch.ops.realera_fast._use_tile_set(name)
    try:
        yield
    finally:
        torch.ops.realera_fast._use_tile_set(before)


@pytest.fixture(params=TILE_SETS)
def tiles(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every set of native loops that the processor can run."""
    with using_tiles(request.param):
        yield request.param


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    return torch.device(name)


_CUDA = pytest.param("cuda", marks=pytest.mark.gpu)


@pytest.fixture(params=["cpu", _CUDA])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Every device the library serves."""
    return _device(request.param)


@pytest.fixture(params=[*(f"cpu-{name}" for name in TILE_SETS), _CUDA])
def device_and_tiles(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Every device, the CPU with every set of native loops."""
    name, _, tile_set = request.param.partition("-")
    with using_tiles(tile_set) if tile_set else nullcontext():
        yield _device(name)


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
