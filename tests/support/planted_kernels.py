"""Kernels with a fault, registered for the CPU, and a process that has checked none yet."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from realera_fast.ops import registry, trust


def plain(name: str) -> Callable[..., Any]:
    """The definition of an operation."""
    return next(op.plain for op in registry.OPS if op.name == name)


@contextmanager
def planted(name: str, kernel: Callable[..., Any]) -> Iterator[None]:
    """Serves an operation on the CPU by `kernel`."""
    library = torch.library.Library("realera_fast", "IMPL")
    with warnings.catch_warnings():
        # That it overrides the kernel that is there.
        warnings.simplefilter("ignore", UserWarning)
        library.impl(name, kernel, "CPU")
    try:
        yield
    finally:
        registry.serve_kernel(name, "cpu")
        # The dispatcher forgets what nobody holds.
        del library


def broken(*_: Any) -> Any:
    """A kernel that does nothing but raise."""
    raise ValueError("no such instruction\nand much more")


@contextmanager
def unchecked(folder: Path) -> Iterator[None]:
    """As in a new process, with an empty folder for what is remembered."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.cached_assets_path", lambda *_: folder)
        patch.setattr(trust, "_judged", set())
        patch.setattr(trust, "_found", {})
        patch.setattr(trust, "_unchecked", set())
        yield
    for op in registry.OPS:
        registry.serve_kernel(op.name, "cpu")
