"""Which words an erasure would move, before anything is edited."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from realera_fast.alignment import AlignmentConfig
from realera_fast.config import EraseConfig
from realera_fast.erasure import Erasure, check_extended
from realera_fast.extending import checked_extends, extended
from realera_fast.inputs import Arguments, checked
from realera_fast.mining import Anchor, Line
from realera_fast.models import Family, Target
from realera_fast.runtime import exclusive
from realera_fast.selection import select
from realera_fast.text import Concept, encode_vocabulary


@dataclass(frozen=True)
class Preview:
    """What an erasure would do with words."""

    neighbors: Mapping[str, tuple[str, ...]]
    """Words that would go with each target."""
    sources: Mapping[str, str]
    """Why: "inflection" of a name, by the "lexicon", or a "token" that the model sees alike."""
    relatives: Mapping[str, tuple[str, ...]]
    """Other kinds of the same thing, which would stay."""
    beyond: Mapping[str, tuple[str, ...]]
    """The nearest words of which nothing is known that would stay."""
    borderline: Mapping[str, tuple[str, ...]]
    """Of these the ones that are near the line."""
    anchors: Mapping[str, Anchor]
    """What targets would become that name no anchor."""
    line: Line
    """How near is near in this model."""


@exclusive
def preview(
    model: Any,
    text_encoders: Any = None,
    concepts: str | Concept | Iterable[str | Concept] | None = None,
    *,
    tokenizer: Any = None,
    preserve: Iterable[str] | None = (),
    reading: Family | None = None,
    config: EraseConfig | None = None,
    progress: bool | None = None,
    target: Target = "weights",
    extends: Erasure | Iterable[Erasure] | None = None,
) -> Preview:
    """Which words `erase` would move, before anything is edited: in seconds.

    Words that should stay are struck out with `MiningConfig.spare`, others are added as synonyms of
    their concept. Nothing is drawn: members of a category (kind "explicit") are not found, and
    words in doubt (`MiningConfig.borderline`) are listed as such.

    Args:
        model, text_encoders, concepts, tokenizer, preserve, reading, config, progress: as those of
            `erase`.
        target, extends: as those of `erase`.

    Raises:
        ValueError, TypeError: as `erase`.
    """
    given = Arguments(
        model=model,
        text_encoders=text_encoders,
        concepts=concepts,
        tokenizer=tokenizer,
        preserve=preserve,
        scheduler=None,
        reading=reading,
        config=config,
        latents=None,
        accelerator=None,
        checkpoint_dir=None,
        resume=False,
        progress=progress,
        target=target,
    )
    erasures = checked_extends(extends)
    whole = extended(given, erasures)
    if erasures:
        check_extended(whole.model, erasures)
    job = checked(replace(whole, config=_without_denoiser(whole.config)))
    known = job.known_words()
    nothing = encode_vocabulary(job.text, job.config.vocabulary, words=())
    selection = select(job, known, nothing, drawn=False)
    around = selection.neighborhood
    return Preview(
        selection.mined,
        around.sources,
        around.relatives,
        around.beyond,
        around.borderline,
        selection.anchors,
        selection.line,
    )


def _without_denoiser(config: EraseConfig | None) -> EraseConfig:
    """The same words, chosen without the denoiser."""
    config = EraseConfig() if config is None else config
    if not isinstance(config, EraseConfig):
        return config  # refused where `erase` refuses it
    return replace(
        config,
        mining=replace(config.mining, borderline=0, attack_rounds=0),
        closed_form=replace(config.closed_form, enabled=True),
        alignment=AlignmentConfig(enabled=False),
    )
