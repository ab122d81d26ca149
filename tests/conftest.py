"""What every test shares: interpreter, seed, poisoned memory, devices."""

from __future__ import annotations

import fnmatch
import gc
import os
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import torch

if not torch.cuda.is_available():
    # Without a GPU Triton's kernels run in its interpreter; it reads this when first imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
from tiles import TILE_SETS, using_tiles

LONGEST = (
    "tests/ops/test_native_library.py",
    "tests/runtime/test_states.py",
    "tests/packaging/test_docs.py",
    "tests/models/test_entrances.py",
    "tests/ops/test_cuda_sources.py",
    "tests/eraser/test_equations.py",
    "tests/erasure/test_erasure.py",
    "tests/models/test_families.py",
    "tests/erasure/test_exports.py",
    "tests/cli/test_demo.py",
    "tests/mining/test_category_members.py",
    "tests/eraser/test_eraser.py",
    "tests/runtime/test_processes.py",
    "tests/alignment/test_alignment.py",
    "tests/packaging/test_lint.py",
    "tests/bench/test_baselines_erase.py",
)
"""Files that take longest, about in this order."""


SLOW = (
    # Other builds of the native code: under sanitizers, and the wheel that is published.
    "tests/ops/test_native_library.py::test_wheel",
    "tests/ops/test_native_library.py::TestSanitizers::*",
    "tests/ops/test_cuda_sources.py::test_sanitizers_find_nothing*",
    "tests/ops/test_cuda_sources.py::test_a_missing_barrier_is_found",
    "tests/packaging/test_wheel.py::test_it_runs_where_torch_is*",
    # Machine code for other GPUs than one of each kind.
    "tests/aot/*[[-]80[]-]*",
    "tests/aot/*[[-]100[]-]*",
    # Pages whose blocks repeat what other tests call, at length.
    "tests/packaging/test_docs.py::test_python_blocks_run[[]docs/*",
    "tests/packaging/test_docs.py::test_site_builds_strictly",
    # Sizes, dtypes and states beside one that stays.
    "tests/eraser/test_equations.py::test_five_hundred_concepts*",
    "tests/eraser/test_equations.py::test_a_killed_run_goes_on_and_ends_the_same*",
    "tests/eraser/test_eraser.py::test_dtype_is_the_unets[[]dtype[12]]",
    "tests/bench/test_baselines_erase.py::test_edits_cross_attention_alone[[]torch.float32*",
    "tests/bench/test_baselines_erase.py::test_the_studio_puts_the_model_back",
    "tests/bench/test_baselines_erase.py::test_speed_never_moves_the_fixed_rows",
    "tests/mining/test_category_members.py::test_cosines_are_those*[[]sd[12]*",
    "tests/runtime/test_states.py::test_state[[]*-alignment]",
    "tests/runtime/test_states.py::test_every_tensor_that_is_made*[[]sd1]",
    "tests/runtime/test_states.py::test_schedulers_of_few_steps*",
    "tests/alignment/test_alignment.py::test_scores_of_a_model_that_is_as_it_was",
    "tests/alignment/test_alignment.py::test_a_hopeless_run*",
    "tests/alignment/test_training.py::test_compiled_student*",
    "tests/eraser/test_robustness.py::test_two_processes_find_what_one_does",
    "tests/models/test_wrapped_models.py::test_sliced_attention",
    "tests/models/test_wrapped_models.py::test_channels_last[[]alignment]",
)
"""What `make test-all` runs and `make test` leaves out, as patterns of names: together half of the
time. Of everything here another case, or the same by another way, is in `make test`."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Names what is slow, and puts what takes longest first: of two processes none is left with it
    at the end."""
    ranks = {name: rank for rank, name in enumerate(LONGEST)}
    root = Path(__file__).parent.parent
    items.sort(key=lambda item: ranks.get(os.path.relpath(item.path, root), len(ranks)))
    for item in items:
        if any(fnmatch.fnmatchcase(item.nodeid, pattern) for pattern in SLOW):
            item.add_marker("slow")


def pytest_collection_finish() -> None:
    """What is imported stays: the collector, which tests of models wake often, need not look."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """At its end a process frees everything."""
    gc.unfreeze()


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
