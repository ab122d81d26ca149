"""Sets of native loops, one for each instruction set: which run here, and using one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

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
