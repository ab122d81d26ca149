"""Results of native code with several numbers of threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from realera_fast import ops  # noqa: F401

NATIVE = torch._C._dispatch_has_kernel_for_dispatch_key("realera_fast::solve_spd", "CPU")


@contextmanager
def using_threads(count: int) -> Iterator[None]:
    """Torch's number of threads inside; the number before stands again afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def same_for_threads(compute: Callable[[], list[Tensor]]) -> None:
    """Fails if the result of native code depends on the number of threads."""
    if not NATIVE:
        pytest.skip("the native library is not built")
    with using_threads(1):
        expected = compute()
    for threads in (2, 3):
        with using_threads(threads):
            got = compute()
        for i, (each, alone) in enumerate(zip(got, expected, strict=True)):
            assert torch.equal(each, alone), f"result {i} differs with {threads} threads"
