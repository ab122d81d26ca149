"""Rows of the closed form: what should move where, and with what weight."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Pairs:
    """Weighted rows ``(source, destination)``: where the map should send which embedding."""

    source: Tensor
    """`[n, d]` embedding rows x."""
    destination: Tensor
    """`[n, d]` rows y, where x should go. Equal to ``source`` for rows that keep their place."""
    weight: Tensor
    """`[n]` weights w, not negative."""

    def __post_init__(self) -> None:
        for name in ("source", "destination", "weight"):
            if not isinstance(getattr(self, name), Tensor):
                raise TypeError(
                    f"{name}: expected a torch.Tensor, got {type(getattr(self, name)).__name__}"
                )
        if self.source.dim() != 2:
            raise ValueError(f"source: expected shape [n, d], got {list(self.source.shape)}")
        if self.destination.shape != self.source.shape:
            raise ValueError(
                f"destination: expected shape {list(self.source.shape)} like source, "
                f"got {list(self.destination.shape)}"
            )
        if self.weight.shape != self.source.shape[:1]:
            raise ValueError(
                f"weight: expected shape [{self.source.shape[0]}] (one for each row of source), "
                f"got {list(self.weight.shape)}"
            )

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Source, destination and weight."""
        return self.source, self.destination, self.weight

    def check(self) -> None:
        """Raises ValueError with the first row that holds NaN, infinity or a negative weight."""
        for name, tensor in zip(("source", "destination", "weight"), self.tensors, strict=True):
            if not tensor.is_floating_point():
                raise ValueError(f"pairs.{name}: expected floating point, got {tensor.dtype}")
        # Sums show any NaN or infinity in one pass; that they overflowed is told apart below.
        sums = [
            t.sum(dtype=torch.float32 if t.dtype in (torch.float16, torch.bfloat16) else None)
            for t in self.tensors
        ]
        least = (
            self.weight.amin()
            if len(self.weight)
            else torch.zeros((), dtype=torch.float64, device="cpu")
        )
        if math.isfinite(float(sum(sums))) and float(least) >= 0:
            return
        for name, values in zip(("source", "destination", "weight"), self.tensors, strict=True):
            bad = (~values.reshape(len(self.weight), -1).isfinite().all(1)).nonzero()
            if len(bad):
                raise ValueError(
                    f"pairs.{name}: row {int(bad[0])} of {len(values)} holds NaN or infinity "
                    f"({len(bad)} such rows); check the text encoder's output and its dtype"
                )
        negative = (self.weight < 0).nonzero()
        if len(negative):
            raise ValueError(
                f"pairs.weight: row {int(negative[0])} is negative; to take rows back, subtract "
                "the equations that hold them"
            )


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows with the root of their weight drawn in, as the dual form takes them."""

    source: Tensor
    """`[n, d]` float64."""
    change: Tensor
    """`[n, d]` float64 destination minus source."""

    @classmethod
    def of(cls, pairs: Pairs) -> Rows:
        root = pairs.weight.to(torch.float64).sqrt()[:, None]
        source = pairs.source.to(torch.float64)
        change = (pairs.destination.to(torch.float64) - source).mul_(root)
        return cls(root * source, change)

    def pairs(self, weight: float = 1.0) -> Pairs:
        ones = torch.full_like(self.source[:, 0], weight)
        return Pairs(self.source, self.source + self.change, ones)


class WaitingRows:
    """Rows that are kept as they are, up to a number."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.parts: list[Rows] = []

    def __len__(self) -> int:
        return sum(len(part.source) for part in self.parts)

    def room_for(self, rows: int) -> bool:
        return len(self) + rows < self.limit


def join_rows(waiting: Sequence[WaitingRows]) -> Rows:
    parts = [part for kept in waiting for part in kept.parts]
    if len(parts) == 1:
        return parts[0]
    if not parts:
        empty = torch.zeros(0, waiting[0].limit, dtype=torch.float64, device="cpu")
        return Rows(empty, empty)
    return Rows(torch.cat([p.source for p in parts]), torch.cat([p.change for p in parts]))
