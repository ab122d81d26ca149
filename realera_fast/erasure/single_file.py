"""Weights inside a single-file checkpoint, found by their values.

Each program has its own key names; values are the same in all of them. So no table of names is
needed, and a file of other weights is noticed.
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from realera_fast.runtime import NAMES, read_header, tensor_at


def find_weights(checkpoint: Path, weights: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Where each weight is in a file.

    Args:
        checkpoint: a safetensors file.
        weights: `[o, i]` by layer name, in the dtype of the loaded model, on any device.

    Returns:
        By layer name the tensors that have its values once they are in its dtype, by key. They are
        parts of the mapped file: nothing is copied, and what is written to them stays in memory.
    """
    header = read_header(checkpoint)
    with open(checkpoint, "rb") as file:
        # Copy on write, as torch wants memory that could be written to; freed with the tensors.
        data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
    by_shape: dict[tuple[int, ...], list[str]] = {}
    for key, entry in header.entries.items():
        if entry.dtype in NAMES.values():
            by_shape.setdefault(entry.shape, []).append(key)
    found: dict[str, dict[str, Tensor]] = {}
    for name, weight in weights.items():
        expected = weight.detach().cpu()
        found[name] = {}
        for key in by_shape.get(tuple(expected.shape), []):
            tensor = tensor_at(data, header, key)
            # The first row tells nearly all of them apart.
            if torch.equal(tensor[:1].to(expected.dtype), expected[:1]) and torch.equal(
                tensor.to(expected.dtype), expected
            ):
                found[name][key] = tensor
    return found
