"""A low-rank addition to one weight."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class LoraFactors:
    """A low-rank addition to one weight: ``W + up @ down``, scaling included."""

    down: Tensor
    """`[r, d]` float32."""
    up: Tensor
    """`[o, r]` float32."""

    def __post_init__(self) -> None:
        if self.down.dim() != 2 or self.up.dim() != 2 or self.up.shape[1] != self.down.shape[0]:
            raise ValueError(
                "down, up: expected shapes [r, d] and [o, r], "
                f"got {list(self.down.shape)} and {list(self.up.shape)}"
            )
        if self.down.dtype != torch.float32 or self.up.dtype != torch.float32:
            raise ValueError(
                f"down, up: expected float32, got {self.down.dtype} and {self.up.dtype}"
            )

    def __add__(self, other: LoraFactors) -> LoraFactors:
        """Both additions as one."""
        return LoraFactors(
            torch.cat((self.down, other.down)), torch.cat((self.up, other.up), dim=1).contiguous()
        )

    @property
    def rank(self) -> int:
        """Number r of rows of ``down``."""
        return self.down.shape[0]

    @property
    def delta(self) -> Tensor:
        """`[o, d]` float32 the dense addition."""
        return self.up @ self.down
