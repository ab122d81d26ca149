"""What every test shares: interpreter, seed, poisoned memory, devices."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import nullcontext

import torch

if not torch.cuda.is_available():
    # Without a GPU Triton's kernels run in its interpreter; it reads this when first imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
from tiles import TILE_SETS, using_tiles


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
