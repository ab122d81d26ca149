"""Hashes of the weights that an erasure edits."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from realera_fast.models.dense import WEIGHT_DTYPES, dense_weight
from realera_fast.models.entrances import Maps, projections


def weights_hash(weights: Mapping[str, Tensor], dtype: torch.dtype) -> str:
    """SHA-256 over names, shapes and values, as `dtype`, whatever the order and device.

    Args:
        weights: `[o, d]` matrix of each name.
        dtype: What the values are rounded to first.
    """
    digest = hashlib.sha256(f"realera_fast {dtype}".encode())
    for name in sorted(weights):
        weight = weights[name].detach().cpu().to(dtype).contiguous()
        digest.update(f"\n{name} {list(weight.shape)}\n".encode())
        digest.update(weight.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def base_hashes(model: nn.Module, maps: Maps | None = None) -> dict[str, str]:
    """Identifies the projection weights, also as they would be after loading in a narrower dtype.

    Of quantized weights these are the values that they stand for, so that a model and the same one
    dequantized agree.

    Returns:
        Dtype name ("float32" …) to SHA-256, for the stored dtype (the widest of several) and each
        of fewer bytes. The same checkpoint loaded in float32 and in bfloat16 agrees on "bfloat16".
    """
    layers = projections(model, maps, as_run=False, target="adapter")
    weights = {name: dense_weight(layer).cpu() for name, layer in layers.items()}
    present = {weight.dtype for weight in weights.values()}
    stored = next(dtype for dtype in WEIGHT_DTYPES if dtype in present)
    return {
        str(dtype).removeprefix("torch."): weights_hash(weights, dtype)
        for dtype in WEIGHT_DTYPES
        if dtype == stored or dtype.itemsize < stored.itemsize
    }
