"""Words near a concept that are something else: what must survive, and is most at risk."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from realera_fast.mining.candidates import Candidate
from realera_fast.mining.config import MiningConfig
from realera_fast.mining.known_words import KnownWords
from realera_fast.runtime import folded
from realera_fast.text import Concept

_HEIGHTS = (1, 2, 3)
"""Steps up in the lexicon and as many down again, until there are relatives enough."""
_FEW = 8
"""Relatives enough to be watched."""
_MOST = 128
"""Relatives by the lexicon that are looked at (count; ours)."""
BORDER = 0.05
"""Cosine by which a word below its line is still in doubt (ours)."""


def siblings_of(known: KnownWords, concept: Concept) -> tuple[str, ...]:
    """What the lexicon calls other kinds of the same thing and the tokenizer knows: of the fewest
    steps up, and of as many as a few take."""
    found: dict[str, None] = {}
    for height in _HEIGHTS:
        found |= dict.fromkeys(_siblings(known, concept, height))
        if len(found) >= _FEW:
            break
    return tuple(found)


def hypernyms_of(known: KnownWords, concept: Concept) -> frozenset[str]:
    """What the lexicon says a concept is a kind of."""
    return frozenset(
        word.lower()
        for name in concept.words
        for word in known.lexicon.hypernyms(name, kind=concept.kind)
    )


def _siblings(known: KnownWords, concept: Concept, height: int) -> list[str]:
    words = (
        word.lower()
        for name in concept.words
        for word in known.lexicon.siblings(name, height, kind=concept.kind)
    )
    return [word for word in words if word in known.names]


def held_words(
    known: KnownWords,
    concept: Concept,
    candidates: Sequence[Candidate],
    *,
    gone: Iterable[str],
    spare: Iterable[str] = (),
    config: MiningConfig,
) -> tuple[str, ...]:
    """Words that a concept's removal would move and that mean something else, the nearest first.

    What the concept is a kind of, other kinds of the same, and things of the tokenizer that lie
    near it and are not related to it; of a category, whose members lie anywhere, none of these.
    What lies above the line, or little below it, may be another word for the concept, unless it is
    another person or the user says so.

    Args:
        candidates: of the concept.
        gone: words that leave, or may.
        spare: words that the user says are something else.
    """
    if not config.relative_words:
        return ()
    related = (c.word for c in candidates if c.relation not in ("sibling", "word"))
    leaving = {folded(word) for word in (*gone, *related)}
    siblings = [c.word for c in candidates if c.relation == "sibling"]
    kin = dict.fromkeys(word for height in _HEIGHTS for word in _siblings(known, concept, height))
    things = [c.word for c in candidates if c.relation == "word" and c.word in known.things]
    pool = (
        *sorted(hypernyms_of(known, concept) & known.names),
        *[*kin][:_MOST],
        *siblings,
        *(() if concept.kind == "explicit" else things),
    )
    found = {folded(word): word for word in reversed(pool) if folded(word) not in leaving}
    if not found:
        return ()
    rows, own = known.rows_of([*found.values()]), known.rows_of(concept.words)
    cosines = known.space.cosines(rows, own).amax(dim=1).tolist()
    people = (*kin, *siblings) if concept.kind == "person" else ()
    certain = {folded(word) for word in (*people, *spare)}
    most = known.line_of_unknown(config.word_cosine) - BORDER
    held = [
        (cosine, word)
        for (key, word), cosine in zip(found.items(), cosines, strict=True)
        if 0.0 < cosine < most or key in certain
    ]
    return tuple(word for _, word in sorted(held, reverse=True)[: config.relative_words])
