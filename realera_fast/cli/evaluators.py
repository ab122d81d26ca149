"""Who judges the pictures of `realera-fast verify`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from realera_fast import embedded
from realera_fast.cli.inputs import Asked
from realera_fast.cli.loading import find_device
from realera_fast.cli.options import usage_error
from realera_fast.erasure import Erasure
from realera_fast.evaluation import (
    STAYS,
    ClipJudge,
    FrechetReference,
    InceptionFeatures,
    find_detector,
    grouped_prompts,
    pictures_in,
)


@dataclass(frozen=True, kw_only=True)
class Evaluators:
    """Judge, scorer, detectors, and features of Fréchet distances."""

    judge: Any
    scorer: Any
    detectors: Mapping[str, Any]
    reference: FrechetReference | None


def evaluators_of(asked: Asked, erasure: Erasure) -> Evaluators:
    """Loads those that options name, the embedded model's own judge for it, and reads the
    reference: what is wrong with any of them is said before pictures are drawn.

    Raises:
        typer.BadParameter: a detector, a package or a picture is not there.
    """
    try:
        detectors = {name: find_detector(name) for name in asked.detectors}
    except ValueError as error:
        raise usage_error("--detector", str(error)) from error
    judge: Any = None
    if asked.clip is not None:
        watched = [word["word"] for word in erasure.report.get("words", ())]
        named = [word for concept in erasure.concepts for word in concept.words]
        things = asked.labels or list(dict.fromkeys([*named, *watched]))
        where = find_device(asked.device)
        judge = ClipJudge.from_pretrained(asked.clip, device=where, things=things)
    elif asked.model == "embedded":
        judge = embedded.load_judge()
    return Evaluators(
        judge=judge,
        scorer=None if asked.clip is None else judge,
        detectors=detectors,
        reference=None if asked.fid is None else _reference(asked, judge),
    )


def _reference(asked: Asked, judge: Any) -> FrechetReference:
    assert asked.fid is not None
    option = "--fid"
    try:
        features = judge
        if asked.fid_weights is not None:
            option = "--fid-weights"
            features = InceptionFeatures(asked.fid_weights, device=find_device(asked.device))
            option = "--fid"
        return FrechetReference(pictures_in(asked.fid), features)
    except (ModuleNotFoundError, ValueError) as error:
        raise usage_error(option, str(error)) from error


def check_stays(
    prompts: Sequence[str] | None, untouched: Sequence[str], seeds: int, erasure: Erasure
) -> None:
    """Refuses prompts of which a Fréchet distance can't be taken, before they are drawn; without
    any it is about those that `verify` takes from the erasure.

    Raises:
        typer.BadParameter: fewer than two pictures show what stays.
    """
    whose = "these prompts" if prompts else "the words of this delta"
    grouped = grouped_prompts(erasure, prompts, untouched)
    pictures = seeds * sum(group in STAYS for group, _ in grouped)
    if pictures < 2:
        raise usage_error(
            "--fid",
            f"needs at least 2 pictures of what stays, and {whose} and seeds draw {pictures};"
            " add --untouched with such prompts, or seeds",
        )
