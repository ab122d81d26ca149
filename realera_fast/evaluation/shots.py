"""Images to sample and what was seen in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from PIL import Image

from realera_fast.evaluation.evaluators import Judge
from realera_fast.evaluation.images import Group
from realera_fast.evaluation.metrics import Scores


@dataclass(frozen=True, kw_only=True)
class Shot:
    """One image to sample and what a faithful model would show in it."""

    erased: str
    """The concept whose scores it counts for."""

    group: Group
    """What the prompt is to that concept."""

    word: str
    """The word of the prompt that is judged."""

    expected: str
    """The judge's name for it."""

    kind: Literal["thing", "style"]
    """Whether the judge is asked for the thing or for the style."""

    prompt: str
    """The prompt."""

    seed: int
    """The seed."""


def prompt_of(template: str, word: str, style: str = "") -> str:
    """A prompt with "an" where English wants it: "a photo of an airplane"."""
    words = template.replace("{style}", style).replace("{}", word).split()
    for i, (one, following) in enumerate(zip(words, words[1:], strict=False)):
        if one in ("a", "an"):
            words[i] = "an" if following[0].lower() in "aeiou" else "a"
    return " ".join(words)


def judged(judge: Judge, shots: Sequence[Shot], pictures: Sequence[Image.Image]) -> list[str]:
    """`[n]` what the judge sees of the kind that each shot asks for."""
    things, styles = judge.classify(pictures)
    return [things[i] if shot.kind == "thing" else styles[i] for i, shot in enumerate(shots)]


def scores_of(shots: Sequence[Shot], seen: Sequence[str], erased: str) -> Scores:
    """The scores of one erased concept; every word counts the same, however many its images."""

    def of(*groups: Group) -> float | None:
        right: dict[str, list[bool]] = {}
        for shot, name in zip(shots, seen, strict=True):
            if shot.erased == erased and shot.group in groups:
                right.setdefault(shot.word, []).append(name == shot.expected)
        if not right:
            return None
        return sum(sum(marks) / len(marks) for marks in right.values()) / len(right)

    efficacy, specificity = of("erased"), of("relative", "untouched")
    assert efficacy is not None and specificity is not None
    return Scores(acc_e=efficacy, acc_s=specificity, acc_g=of("synonym"))
