"""Pictures that show nothing properly: blends, halves, smears. The judge learns to say so."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def soft_mask(rng: np.random.Generator, count: int, size: int) -> Tensor:
    """Smooth masks ``[count, 1, size, size]`` in 0..1, about half of each covered."""
    coarse = torch.from_numpy(rng.random((count, 1, 4, 4), dtype=np.float32))
    mask = F.interpolate(coarse, size=size, mode="bicubic", align_corners=False)
    return ((mask - 0.5) * 8 + 0.5).clamp(0, 1)


def warp(x: Tensor, rng: np.random.Generator, strength: float) -> Tensor:
    """Pictures pulled about by a smooth field; ``strength`` is a share of the picture."""
    field = torch.from_numpy(rng.normal(0, strength, (len(x), 2, 6, 6)).astype(np.float32))
    field = F.interpolate(field, size=x.shape[-1], mode="bicubic", align_corners=False)
    identity = F.affine_grid(torch.eye(2, 3).expand(len(x), 2, 3), list(x.shape), False)
    grid = identity + field.permute(0, 2, 3, 1)
    return F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)


def junk(x: Tensor, rng: np.random.Generator) -> Tensor:
    """Junk ``[n, 3, s, s]`` made of proper pictures ``x``, of one random kind each."""
    other, size = x.roll(1, 0), x.shape[-1]
    weight = torch.from_numpy(rng.uniform(0.35, 0.65, (len(x), 1, 1, 1)).astype(np.float32))
    half = torch.zeros(len(x), 1, size, size)
    half[..., : size // 2] = 1
    turned = torch.from_numpy(rng.random(len(x)) < 0.5)[:, None, None, None]
    half = torch.where(turned, half.transpose(2, 3), half)
    small = F.interpolate(F.interpolate(x, size=7, mode="area"), size=size, mode="bicubic")
    ground = x[:, :, :3, :3].mean((2, 3), keepdim=True).expand_as(x)
    kinds = torch.stack(
        [
            torch.lerp(x, other, weight),
            torch.lerp(x, other, soft_mask(rng, len(x), size)),
            torch.lerp(x, other, half),
            torch.lerp(x, ground, half),
            small,
            warp(x, rng, 0.35),
        ]
    )
    chosen = torch.from_numpy(rng.integers(0, len(kinds), len(x)))
    return kinds[chosen, torch.arange(len(x))]
