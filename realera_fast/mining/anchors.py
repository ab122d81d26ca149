"""What a concept becomes where the user names nothing: something near that the model can draw."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from realera_fast.mining.known_words import KnownWords
from realera_fast.runtime import folded
from realera_fast.text import Concept

_HEIGHTS = (1, 2, 3)
"""Steps up in the lexicon and as many down again: felines beside a cat, then carnivores."""
_SAMPLED = 1000
"""Things by which clearness is told (count; ours)."""
_LEAST_USED = 1
"""Times that an anchor is tagged in WordNet's texts (count; ours): rare words are no good aim."""
_CLEAR = 0.95
"""Share of the tokenizer's things that an anchor is clearer than (ours)."""
_NEAREST = 5
"""The clearest of so many nearest ones is taken (count; ours)."""
_MEDIA = ("photo", "painting", "drawing", "illustration", "sculpture")
"""What pictures in a style are in none (ours)."""
_PEOPLE = ("man", "woman")
_ANYBODY = "person"


@dataclass(frozen=True)
class Anchor:
    """What a concept becomes."""

    words: tuple[str, ...]
    """Several are averaged; none leaves it to the concept."""
    why: str
    """Who chose it, for reports."""


def choose_anchors(
    known: KnownWords,
    concepts: Sequence[Concept],
    *,
    gone: Sequence[str],
) -> dict[str, Anchor]:
    """An anchor for each concept that has none, by target.

    A near but distinct concept erases better than a distant one or none, and what is drawn in its
    place is a picture of something (method, section 8). An object becomes a sibling by the lexicon,
    of the fewest steps, that is a token of its own, that the model writes as clearly as the
    clearest things, and that is no look-alike of anything that goes: it lies below the middle
    between the two lines; or else any such thing. Of the nearest few the clearest is taken. A
    person becomes a merge of people, so nobody in particular, and a style the nearest medium. What
    is explicit becomes the mean word.

    Args:
        gone: words that leave or may, which are no anchors.
    """
    taken = {folded(word) for word in gone}
    every = known.rows_of([word for concept in concepts for word in concept.words])
    clear = _clearness(known)
    found = {}
    for concept in concepts:
        if concept.anchor is not None:
            continue
        for words, why in _choices(known, concept, taken):
            if concept.kind == "object":
                chosen = _nearest(known, words, concept, every, clear, _NEAREST)
            else:
                chosen = _nearest(known, words, concept, every, 0.0)
            if chosen is not None:
                merged = None
                if concept.kind == "person":
                    merged = _nearest(known, _usable(known, [_ANYBODY], taken), concept, every, 0.0)
                found[concept.target] = Anchor((chosen, merged) if merged else (chosen,), why)
                break
    return found


def _choices(
    known: KnownWords, concept: Concept, taken: set[str]
) -> Iterator[tuple[list[str], str]]:
    """Words of which one may be the anchor, and why, the best first."""
    if concept.kind == "object":
        for kin, steps in _siblings(known, concept, taken):
            yield kin, f"a sibling by the lexicon ({steps} up)"
        things = [word for word in known.read.things if word in known.numbers]
        yield _fit(known, things, taken), "the nearest thing that is none like it"
    some = {"person": (_PEOPLE, "a merge of people"), "style": (_MEDIA, "the nearest medium")}
    if concept.kind in some:
        words, why = some[concept.kind]
        yield _usable(known, words, taken), why


def _usable(known: KnownWords, words: Iterable[str], taken: set[str]) -> list[str]:
    """Those of words that are tokens of their own and stay."""
    return [word for word in words if word in known.names and folded(word) not in taken]


def _siblings(
    known: KnownWords, concept: Concept, taken: set[str]
) -> Iterator[tuple[list[str], int]]:
    for height in _HEIGHTS:
        words = {
            word.lower(): None
            for name in concept.words
            for word in known.lexicon.siblings(name, height, kind=concept.kind)
        }
        yield (
            _fit(known, words, taken),
            height,
        )


def _fit(known: KnownWords, words: Iterable[str], taken: set[str]) -> list[str]:
    """Those of words that a thing may become: in use, and no kind of people."""
    return [
        word
        for word in _usable(known, words, taken)
        if known.lexicon.uses(word) >= _LEAST_USED and known.lexicon.kinds(word)[:1] != ("person",)
    ]


def _nearest(
    known: KnownWords,
    words: Sequence[str],
    concept: Concept,
    every: Tensor,
    clear: float,
    most: int = 1,
) -> str | None:
    """Of the nearest words that are clear and no look-alikes of anything that goes the clearest."""
    if not words:
        return None
    rows = known.rows_of(words)
    to_all = known.space.cosines(rows, every).amax(dim=1)
    to_own = known.space.cosines(rows, known.rows_of(concept.words)).amax(dim=1)
    far = (known.line.unknown + known.line.related) / 2
    lengths = known.space.lengths(rows)
    fits = ((to_all < far) & (lengths >= clear)).nonzero().flatten()
    if not len(fits):
        return None
    nearest = fits[to_own[fits].argsort(descending=True)[:most]]
    return words[int(nearest[lengths[nearest].argmax()])]


def _clearness(known: KnownWords) -> float:
    """Least length of a word that the model knows well."""
    things = [word for word in known.read.things if word in known.numbers]
    lengths = known.space.lengths(known.rows_of(things[:: max(1, len(things) // _SAMPLED)]))
    return float(lengths.quantile(_CLEAR)) if len(lengths) else 0.0
