"""Results of native code with several numbers of threads."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from realera_fast import ops  # noqa: F401

NATIVE = torch._C._dispatch_has_kernel_for_dispatch_key("realera_fast::solve_spd", "CPU")


def same_for_threads(compute: Callable[[], list[Tensor]]) -> None:
    """Fails if the result of native code depends on the number of threads."""
    if not NATIVE:
        pytest.skip("the native library is not built")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = compute()
        for threads in (2, 3):
            torch.set_num_threads(threads)
            for i, (got, alone) in enumerate(zip(compute(), expected, strict=True)):
                assert torch.equal(got, alone), f"result {i} differs with {threads} threads"
    finally:
        torch.set_num_threads(before)
