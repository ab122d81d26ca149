"""How do I know it worked? Numbers about an erasure, measured on the weights as stored.

Movement is measured where the text enters the denoiser, at the outputs of all projections:

    moved(word) = (W' x - W x) . (W y - W x) / |W y - W x|^2     1: reached y, 0: nothing happened
    drift(word) = |W' x - W x| / spread                  1: as far as one word is from another

y is the word's anchor: one that was sent past it (`PairsConfig`) may have moved by more than 1.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from realera_fast.text import AlignedPrompts, Concept

logger = logging.getLogger(__name__)

MOVED_ENOUGH = 0.4
"""A named word that went less of the way to its anchor is warned of: it is drawn still (ours: where
pictures of 16 tuning things of the embedded model change; `scales`)."""
DRIFTED = 0.6
"""A word that should stay and went further, in distances between words, is warned of (ours: there
as well)."""
_NAMED = 6
"""Words that a warning names."""


@dataclass(frozen=True)
class WordReport:
    """How far one word moved."""

    word: str
    role: str
    """"target", "synonym", "neighbor", "preserved" (named words and anchors), "relative" (by the
    lexicon) or "vocabulary"."""
    anchor: str | None
    moved: float | None
    """Fraction of the way to where they are sent, for words that should go."""
    drift: float | None
    """Distance moved, in distances between words, for words that should stay."""


@dataclass(frozen=True)
class Report:
    """Everything measured about one erasure."""

    words: tuple[WordReport, ...]
    neighbors: Mapping[str, tuple[str, ...]]
    """Mined neighbor words by target."""
    relatives: Mapping[str, tuple[str, ...]]
    """Other kinds of the same thing by the lexicon, which must stay, by target."""
    beyond: Mapping[str, tuple[str, ...]]
    """The nearest words outside the neighborhood, which stay, by target."""
    borderline: Mapping[str, tuple[str, ...]]
    """Words that are outside by little, by target."""
    sources: Mapping[str, str]
    """Why a neighbor is one: "inflection" of a name, by the "lexicon", a "token" that the model
    sees alike, or a "member" of a category, or as it is "drawn"."""
    line: Mapping[str, Any]
    """Least cosines of neighbors in this model, and how well they part the lexicon's pairs
    (`mining.Line`)."""
    anchors: Mapping[str, Mapping[str, Any]]
    """What concepts became that named no anchor, and why, by target."""
    scales: Mapping[str, Any]
    """`preserve_scale`, `negative_guidance`, and the curve that they were chosen from."""
    solve: Mapping[str, Any]
    """Method, condition estimate, residual ratio, rank, dropped mass, rows."""
    layers: Mapping[str, float]
    """|W' - W| / |W| of every projection, Frobenius."""
    attacks: Mapping[str, Sequence[Mapping[str, float]]]
    """Of each round of attacks (`MiningConfig.attack_rounds`) by target: mean squared error between
    what the found prompts brought back and the concept, at their "first" steps and "last" ones."""
    alignment: Mapping[str, Any]
    seconds: Mapping[str, float]
    """Wall-clock seconds by stage."""
    warnings: tuple[str, ...]
    reading: tuple[str, ...]
    """For which prompts the erasure holds: text encoders, their output, length and padding."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def anchors_of(report: Mapping[str, Any]) -> dict[str, Any]:
    """Anchors that nobody named, by target, of an erasure or of several in one."""
    found = dict(report.get("anchors", {}))
    for part in report.get("parts", ()):
        found |= anchors_of(part)
    return found


def neighbors_of(report: Mapping[str, Any]) -> dict[str, list[str]]:
    """Mined neighbors by target, of an erasure or of several in one."""
    found = {target: list(words) for target, words in report.get("neighbors", {}).items()}
    for part in report.get("parts", ()):
        for target, words in neighbors_of(part).items():
            found[target] = list(dict.fromkeys((*found.get(target, ()), *words)))
    return found


def watched_of(report: Mapping[str, Any]) -> list[str]:
    """Words that stay and were looked at for drift, of an erasure or of several in one."""
    found = [word["word"] for word in report.get("words", ()) if word["drift"] is not None]
    for part in report.get("parts", ()):
        found += watched_of(part)
    return list(dict.fromkeys(found))


def anchor_name(concept: Concept, anchors: Mapping[str, Any]) -> str:
    """What a concept became, in words: its own anchor, or the one that was taken."""
    chosen = anchors.get(concept.target)
    return " or ".join(chosen["words"]) if chosen else concept.anchor_name


class Movement:
    """Distances at the outputs of all projections, from three `[d, d]` sums made once.

    They are of the products of W' - W and W with themselves and each other, so that a word needs no
    product with the weights.
    """

    def __init__(self, before: Iterable[Tensor], after: Iterable[Tensor]) -> None:
        """
        Args:
            before, after: `[o_l, d]` weights of the projections, one at least; each is asked for
                once, and none is kept.
        """
        empty = True
        for old, new in zip(before, after, strict=True):
            weight = old.double()
            if empty:
                self._original = weight.new_zeros(weight.shape[1], weight.shape[1])
                self._mixed, self._change = (torch.zeros_like(self._original) for _ in range(2))
                empty = False
            change = new.double() - weight
            self._original.addmm_(weight.mT, weight)
            self._mixed.addmm_(change.mT, weight)
            self._change.addmm_(change.mT, change)

    def moved(self, prompts: AlignedPrompts) -> float | None:
        """Fraction of the way to its anchor that a word went, more than 1 of one that went past it;
        None if there was none to go."""
        rows = prompts.weight > 0
        x, y = (states[rows].to(self._original) for states in (prompts.source, prompts.destination))
        way = y - x
        length = _sum(way, self._original, way)
        return _sum(x, self._mixed, way) / length if length > 0.0 else None

    def drifts(self, hidden: Tensor, carries: Tensor) -> list[float]:
        """How far each of `[w, t, d]` prompts went, in their mean distances from their mean.

        Args:
            carries: `[w, t]` bool, which rows carry text.
        """
        if not len(hidden):
            return []
        carries = carries.to(self._change.device)[..., None]
        x = hidden.to(self._change.device, torch.float64) * carries
        # One word alone is not apart from anything: its own length is the measure then.
        center = torch.zeros_like(x[0])
        if len(x) > 1:
            # Of each place those that have a row there.
            center = x.sum(dim=0) / carries.sum(dim=0).clamp_min(1)
        apart = ((x - center) * carries).flatten(0, 1)
        spread = math.sqrt(max(0.0, _sum(apart, self._original, apart)) / max(1, len(x)))
        return [
            math.sqrt(max(0.0, _sum(prompt, self._change, prompt))) / max(spread, 1e-12)
            for prompt in x
        ]


def _sum(left: Tensor, matrix: Tensor, right: Tensor) -> float:
    """The sum over rows of l^T M r."""
    return float(((left @ matrix) * right).sum())


def warnings_of(
    words: Sequence[WordReport], alignment: Mapping[str, Any], *, values: bool = False
) -> tuple[str, ...]:
    """What a user should look at, in words.

    Args:
        values: whether the outputs of value projections were moved, and not the text.
    """
    further = "raise erase_scale, lower preserve_scale or choose a nearer anchor"
    narrower = "narrow the neighborhood (mining.word_cosine, of a category mining.member_cosine)"
    if values:
        further = "raise closed_form.value_guidance or choose another anchor"
        narrower = "lower closed_form.value_guidance or closed_form.value_ridge"
    found = []
    for word in words:
        if word.moved is not None and word.role != "neighbor" and word.moved < MOVED_ENOUGH:
            found.append(
                f"{word.role} {word.word!r} went only {word.moved:.0%} of the way to what it is to "
                f"become ({word.anchor}): {further}"
            )
    far = [(w.drift, w.word) for w in words if w.drift is not None and w.drift > DRIFTED]
    if far:
        far.sort(reverse=True)
        some = ", ".join(f"{word!r} {drift:.2f}" for drift, word in far[:_NAMED])
        more = f" and {len(far) - _NAMED} more" if len(far) > _NAMED else ""
        found.append(
            f"words that should stay moved, in distances between words: {some}{more}; name those "
            f"that matter in preserve=, or {narrower}"
        )
    if str(alignment.get("stopped", "")).startswith("diverged"):
        found.append(
            f"noise alignment {alignment['stopped']}; lower alignment.learning_rate or "
            "alignment.negative_guidance"
        )
    if alignment.get("kept") is False and alignment.get("steps"):
        found.append(
            "noise alignment did not improve held-back pictures; the closed form stays alone"
        )
    for text in found:
        logger.warning(text)
    return tuple(found)
