"""Settings of the closed form."""

from __future__ import annotations

import math
from dataclasses import dataclass

from realera_fast.runtime import check_scale, check_types
from realera_fast.solver.concept_map import check_rank_tolerance
from realera_fast.solver.value_space import check_value_ridge

SPACES = ("auto", "text", "values")
"""Where the closed form is solved; see `ClosedFormConfig.space`."""


@dataclass(frozen=True, kw_only=True)
class ClosedFormConfig:
    """Options of the closed form."""

    enabled: bool = True
    """Edit the weights in closed form (default: yes; without it noise alignment works alone, which
    is there to measure what each stage does)."""
    ridge: float = 1e-3
    """Weight of ``|W' - W|_F^2`` in the objective, as a fraction of the mean squared entry of a
    preserved row, so that it means the same for every text encoder. Greater is gentler. Default
    (ours): UCE's 0.5 beside one row of CLIP ViT-L/14 (squared length about 780) is 0.5 in the units
    of that row's mean squared entry, and holds one vector a concept; here a vocabulary holds."""
    rank_tolerance: float = 1e-6
    """Singular values of T - I below this fraction of the greatest are dropped; no unit. Default
    is ours: about ten roundings of float32, the precision the factors are stored in."""
    keep_system: bool = False
    """Whether the erasure keeps the factored equations, so that single concepts can be withdrawn
    later (`Erasure.without`). They are saved with it: up to 16 d^2 bytes of rows for each concept
    and 16 d^2 bytes once (9.4 MB each for Stable Diffusion 1). Default (ours): not kept."""

    space: str = "auto"
    """Where it is solved. "text": one map of the text for all layers, which prompts, withdrawal and
    other models can take. "values": the outputs of each value projection are moved themselves
    (`value_space`), which free token vectors undo less; on Stable Diffusion 1, 2 and XL. "auto"
    (default): where more words go and stay, of the two, and of categories alone (kind "explicit")
    the values; the text where a setting asks for what only that has
    (`EraseConfig.asks_for_text`). `ridge`, `preserve_scale`, `negative_guidance`,
    `neighbor_scale`, `erase_scale` and templates are of the text: of "values" they serve SDXL's
    pooled vector alone."""
    value_ridge: float | str = "auto"
    """Of "values": weight of ``|R - I|_F^2``, in units of the mean second moment of outputs that
    stay. Greater reaches more words that nobody lists, and more of the rest. "auto" (default): what
    serves most words (`values.moved_values`)."""
    value_guidance: float | str = "auto"
    """Of "values": g of the goal a + g (a / 2 - c) for outputs c of a named word and a of its
    anchor. 0 draws the anchor; at 1 attacks with free token vectors found nothing
    (docs/alignment.md). A number is the greatest that is taken: less where things that should stay
    would move. "auto" (default): what serves most words; 1 of categories alone."""

    value_neighbors: float | str = "auto"
    """Of "values": weight of each mined word beside what stays; 0 leaves mined words out, but those
    of a category (kind "explicit"), which weigh 1 at least. "auto" (default): what serves most
    words."""

    def __post_init__(self) -> None:
        check_types(self)
        check_ridge(self.ridge)
        check_rank_tolerance(self.rank_tolerance)
        if self.space not in SPACES:
            raise ValueError(f"ClosedFormConfig.space must be one of {SPACES}, got {self.space!r}")
        for name in ("value_ridge", "value_guidance", "value_neighbors"):
            check_scale(getattr(self, name), f"ClosedFormConfig.{name}")
        if not isinstance(self.value_ridge, str):
            check_value_ridge(self.value_ridge)
        if self.space == "values" and self.keep_system:
            raise ValueError(
                'ClosedFormConfig.keep_system keeps the equations of the text, and space="values" '
                "solves others; erase without it, and withdraw the whole erasure"
            )


def check_ridge(ridge: float) -> None:
    """Raises TypeError or ValueError unless it is a usable ridge."""
    if not isinstance(ridge, int | float) or isinstance(ridge, bool):
        raise TypeError(f"ridge: expected a number, got {type(ridge).__name__}")
    if not 0 <= ridge < math.inf:
        raise ValueError(f"ridge: expected a finite number of at least 0, got {ridge}")
