"""How do I know it worked? Numbers about an erasure, measured on the weights as stored.

Movement is measured where the text enters the denoiser, at the outputs of all projections:

    moved(word) = 1 - |W' x - W y| / |W x - W y|     1: became the anchor, 0: nothing happened
    drift(word) = |W' x - W x| / spread              1: as far as one word is from another
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from realera_fast.pairs import AlignedPrompts

logger = logging.getLogger(__name__)

MOVED_ENOUGH = 0.5
"""A named word that went less than half the way to its anchor is warned of."""
DRIFTED = 0.5
"""A preserved word that went more than half the way to another word is warned of."""


@dataclass(frozen=True)
class WordReport:
    """How far one word moved."""

    word: str
    role: str
    """"target", "synonym", "neighbor", "preserved" (named words and anchors) or "vocabulary"."""
    anchor: str | None
    moved: float | None
    """Fraction of the way to the anchor, for words that should go there."""
    drift: float | None
    """Distance moved, in distances between words, for words that should stay."""


@dataclass(frozen=True)
class Report:
    """Everything measured about one erasure."""

    words: tuple[WordReport, ...]
    neighbors: Mapping[str, tuple[str, ...]]
    """Mined neighbor words by target."""
    solve: Mapping[str, Any]
    """Method, condition estimate, residual ratio, rank, dropped mass, rows."""
    layers: Mapping[str, float]
    """|W' - W| / |W| of every projection, Frobenius."""
    alignment: Mapping[str, Any]
    seconds: Mapping[str, float]
    """Wall-clock seconds by stage."""
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def _outputs(weights: Sequence[Tensor], rows: Tensor) -> Tensor:
    """`[n, m]` float32: rows through all projections, side by side."""
    return torch.cat([rows @ weight.float().T for weight in weights], dim=1)


def moved(
    before: Sequence[Tensor], after: Sequence[Tensor], prompts: AlignedPrompts
) -> float | None:
    """Fraction of the way that a word went to its anchor; `None` if the two were never apart."""
    rows = prompts.weight > 0
    device = before[0].device
    source, destination = prompts.source[rows].to(device), prompts.destination[rows].to(device)
    goal = _outputs(before, destination)
    way = float((_outputs(before, source) - goal).norm())
    if way == 0.0:
        return None
    return 1.0 - float((_outputs(after, source) - goal).norm()) / way


def drifts(before: Sequence[Tensor], after: Sequence[Tensor], hidden: Tensor) -> list[float]:
    """How far each of `[w, t, d]` prompts went, in units of their mean distance from their mean."""
    hidden = hidden[:, 1:].to(before[0].device)
    # One word alone is not apart from anything: its own length is the measure then.
    center = hidden.mean(dim=0) if len(hidden) > 1 else torch.zeros_like(hidden[:1])
    spread = _outputs(before, (hidden - center).flatten(0, 1)).norm()
    spread = float(spread) / max(1, len(hidden)) ** 0.5
    change = [a.float() - b.float() for a, b in zip(after, before, strict=True)]
    return [float(_outputs(change, prompt).norm()) / max(spread, 1e-12) for prompt in hidden]


def warnings_of(words: Sequence[WordReport], alignment: Mapping[str, Any]) -> tuple[str, ...]:
    """What a user should look at, in words."""
    found = []
    for word in words:
        if word.moved is not None and word.role != "neighbor" and word.moved < MOVED_ENOUGH:
            found.append(
                f"{word.role} {word.word!r} went only {word.moved:.0%} of the way to "
                f"{word.anchor!r}: raise erase_scale, lower preserve_scale or choose a nearer "
                "anchor"
            )
        if word.drift is not None and word.drift > DRIFTED:
            found.append(
                f"{word.role} {word.word!r} moved {word.drift:.2f} word distances: name it in "
                "preserve=, or narrow the neighborhood (mining.word_cosine)"
            )
    if alignment.get("kept") is False and alignment.get("steps"):
        found.append(
            "noise alignment did not improve held-back pictures; the closed form stays alone"
        )
    for text in found:
        logger.warning(text)
    return tuple(found)
