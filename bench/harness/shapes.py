"""Shapes of the projections that a text enters a denoiser by."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Shape:
    """The projections of a model."""

    name: str
    width: int
    heights: tuple[int, ...]
    own_rows: bool = False
    """Whether every matrix has rows, and so a system, of its own."""
    preserved: int = 0
    """Rows that keep their place, beside those of the concepts."""


SD = Shape("SD 1.4", 768, (320,) * 10 + (640,) * 10 + (1280,) * 12)
SDXL = Shape("SDXL", 2048, (640,) * 20 + (1280,) * 120)
KEPT = replace(SD, name="SD 1.4, 2,000 rows preserved", preserved=2000)
FLUX = Shape("FLUX-like", 3072, (3072,) * 57, own_rows=True)
