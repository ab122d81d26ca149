"""Images to sample and what was seen in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from PIL import Image

from realera_fast.evaluation.evaluators import Judge, SceneJudge
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

    kind: Literal["thing", "style", "scene"]
    """What the judge is asked for: the one thing, the style, or everything that is there."""

    prompt: str
    """The prompt."""

    seed: int
    """The seed."""


def judged(judge: Judge, shots: Sequence[Shot], pictures: Sequence[Image.Image]) -> list[str]:
    """`[n]` what the judge sees of the kind that each shot asks for; of scenes, all that is there,
    joined by commas."""
    things, styles = judge.classify(pictures)
    seen = {"thing": list(things), "style": list(styles), "scene": list(things)}
    scenes = [i for i, shot in enumerate(shots) if shot.kind == "scene"]
    if scenes:
        if not isinstance(judge, SceneJudge):
            raise TypeError(
                f"judge: scenes need one with a method `look`, got {type(judge).__name__}"
            )
        for i, sight in zip(scenes, judge.look([pictures[i] for i in scenes]), strict=True):
            # Where the image is junk its name is none of the things.
            is_thing = sight.name in sight.things
            seen["scene"][i] = ", ".join(sight.things) if is_thing else sight.name
    return [seen[shot.kind][i] for i, shot in enumerate(shots)]


def is_right(shot: Shot, seen: str) -> bool:
    """Whether the judge saw what the shot expects; in a scene, among other things."""
    return shot.expected in (seen.split(", ") if shot.kind == "scene" else [seen])


def scores_of(shots: Sequence[Shot], seen: Sequence[str], erased: str) -> Scores:
    """The scores of one erased concept; every word counts the same, however many its images."""

    def of(*groups: Group) -> float | None:
        right: dict[str, list[bool]] = {}
        for shot, name in zip(shots, seen, strict=True):
            if shot.erased == erased and shot.group in groups:
                right.setdefault(shot.word, []).append(is_right(shot, name))
        if not right:
            return None
        return sum(sum(marks) / len(marks) for marks in right.values()) / len(right)

    efficacy, specificity = of("erased"), of("relative", "untouched")
    assert efficacy is not None and specificity is not None
    return Scores(acc_e=efficacy, acc_s=specificity, acc_g=of("synonym"))
