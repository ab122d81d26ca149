"""Problems of the closed form, and the time that no code gets below.

The floor of a point comes from rates measured in the same run (MKL or cuBLAS, same threads):

    f64 flops / f64 rate + max(f32 flops / f32 rate, bytes / in-place rate)

where bytes is every weight read and written once, and the in-place rate is that of `w *= 1` over
the same weights (stricter than a copy). For n rows, all moved, d features, m outputs, k = min(n,d):

    dual system    n^2 d (one triangle of X X^T) + n^3 / 3 + 2 n^2 d
    primal system  n d^2 (one triangle) + 2 n d^2 (D) + d^3 / 3 + 2 d^3
    update         min(4 m d k, 2 m d^2)

With k < d rows moved and others preserved, the primal system needs 2 k d^2 in place of D and 2 d^3.

and the cheaper system counts. With rows of their own for each matrix, systems are counted as often.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from harness.shapes import Shape
from harness.timing import Clock
from torch import Tensor


@dataclass(frozen=True)
class Point:
    """One problem, given to every candidate."""

    shape: Shape
    concepts: int
    tokens: int = 1
    """Rows of a concept: UCE's last token, or 30 prompts of 75 tokens as in MACE."""
    ridge: float = 0.5
    """UCE's; 1e3 is MACE's."""
    dtype: torch.dtype = torch.float32
    matrices: int | None = None
    """How many of the shape's matrices are edited, if not all."""

    @property
    def title(self) -> str:
        return f"{self.shape.name} {self.concepts:,}"

    @property
    def rows(self) -> int:
        """Rows that move."""
        return self.concepts * self.tokens

    @property
    def total(self) -> int:
        return self.rows + self.shape.preserved

    @property
    def heights(self) -> list[int]:
        """Heights in an order whose every beginning looks like the whole."""
        heights = self.shape.heights
        golden = (math.sqrt(5) - 1) / 2
        order = sorted(range(len(heights)), key=lambda i: (i * golden + 0.4) % 1)
        return [heights[i] for i in order][: self.matrices]


@dataclass(frozen=True)
class Rates:
    """What the machine does at best, a second."""

    float32: float
    float64: float
    in_place: float = 0.0
    copy: float = 0.0


def floors(point: Point, rates: Rates, matrices: int | None = None) -> dict[str, float]:
    """Milliseconds that no code gets below, by stage, for the first ``matrices`` of the point."""
    heights = point.heights[:matrices]
    n, k, d, m = point.total, point.rows, point.shape.width, sum(heights)
    dual = n * n * d + n**3 / 3 + 2 * n * n * d
    few = 2 * k * d * d
    primal = n * d * d + d**3 / 3 + (few if k < d else few + 2 * d**3)
    systems = len(heights) if point.shape.own_rows else 1
    flops = min(4 * m * d * min(k, d), 2 * m * d * d)
    memory = 2 * m * d * point.dtype.itemsize
    solve = systems * min(dual, primal) / rates.float64
    update = max(flops / rates.float32, memory / rates.in_place)
    return {"solve": 1e3 * solve, "update": 1e3 * update, "total": 1e3 * (solve + update)}


def gemm_rates(device: torch.device) -> Rates:
    def rate(dtype: torch.dtype, size: int) -> float:
        a = torch.randn(size, size, dtype=dtype, device=device)
        out = torch.empty_like(a)
        return 2 * size**3 / Clock(device).best_seconds(lambda: torch.mm(a, a, out=out), 5)

    large = device.type == "cuda"
    return Rates(
        rate(torch.float32, 8192 if large else 2048), rate(torch.float64, 8192 if large else 1536)
    )


def with_memory_rates(
    rates: Rates, work: list[Tensor], weights: list[Tensor], device: torch.device
) -> Rates:
    size = 2 * sum(weight.nbytes for weight in weights)
    clock = Clock(device)
    in_place = clock.best_seconds(lambda: torch._foreach_mul_(work, 1.0), 5, 0.1)
    copy = clock.best_seconds(lambda: torch._foreach_copy_(work, weights), 5, 0.1)
    return replace(rates, in_place=size / in_place, copy=size / copy)
