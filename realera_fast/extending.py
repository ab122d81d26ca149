"""Erasing more from a model that was erased from before: all of it in one solve."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Iterable, Iterator, Sequence

from realera_fast.config import EraseConfig
from realera_fast.erasure import Erasure, taken_off
from realera_fast.inputs import Arguments, with_parts
from realera_fast.runtime import clean_names
from realera_fast.text import Concept, parse_concepts

logger = logging.getLogger(__name__)


def checked_extends(extends: Erasure | Iterable[Erasure] | None) -> tuple[Erasure, ...]:
    """The erasures that go on.

    Raises:
        TypeError: it is something else.
    """
    if extends is None:
        return ()
    erasures = (extends,) if isinstance(extends, Erasure) else extends
    found = tuple(erasures) if isinstance(erasures, Iterable) else (erasures,)
    for each in found:
        if not isinstance(each, Erasure):
            raise TypeError(
                "extends: expected an Erasure or several of them (Erasure.load reads a file), got "
                f"{type(each).__name__}"
            )
    return found


def joined_concepts(erasures: Sequence[Erasure], new: Sequence[Concept]) -> list[Concept]:
    """What erasures took, then what is to go now, each name once: the last that names it says how.

    Names are compared as they are written: some text encoders tell cases apart.
    """
    named = {concept.target for concept in new}
    before = {c.target: c for each in erasures for c in each.concepts}
    return [*(c for target, c in before.items() if target not in named), *new]


def extended(given: Arguments, erasures: Sequence[Erasure]) -> Arguments:
    """Arguments that ask for what the erasures took as well.

    A concept that is named again, or that a later erasure has too, replaces the one of before.
    Where no settings are given, those of the last erasure hold.
    """
    if not erasures:
        return given
    given = with_parts(given)
    preserve = clean_names(given.preserve, "preserve")
    new = parse_concepts(given.concepts, preserve=preserve)
    took = {concept.target for each in erasures for concept in each.concepts}
    for concept in new:
        if concept.target in took:
            logger.warning(
                "extends: %r is in it already; as it is named now it goes", concept.target
            )
    for each in erasures:
        if "preserve" not in each.provenance:
            logger.warning(
                "extends: %r is of a version that kept no preserved words; name in preserve= what "
                "must stay",
                each,
            )
    if given.config is None and any(each.config != erasures[-1].config for each in erasures):
        logger.warning("extends: the erasures have different settings; those of the last one hold")
    return dataclasses.replace(
        given,
        concepts=joined_concepts(erasures, new),
        preserve=preserve,
        inherited=tuple(w for each in erasures for w in each.provenance.get("preserve", ())),
        config=given.config or EraseConfig.from_dict(erasures[-1].config),
    )


@contextlib.contextmanager
def extending(given: Arguments, erasures: Sequence[Erasure]) -> Iterator[Arguments]:
    """The arguments for all of it, while the model is as before these erasures; they are applied
    again if anything fails."""
    if not erasures:
        yield given
        return
    given = extended(given, erasures)
    with taken_off(given.model, erasures):
        yield given
