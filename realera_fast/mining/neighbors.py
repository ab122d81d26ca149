"""Words that follow a concept, and those that must not."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from realera_fast.mining.candidates import Candidate
from realera_fast.mining.config import MiningConfig
from realera_fast.mining.known_words import KnownWords
from realera_fast.mining.relatives import BORDER, held_words, hypernyms_of, siblings_of
from realera_fast.runtime import folded, progress_bar
from realera_fast.text import Concept

_CATEGORY = 2
"""Times `max_words` that go with a category, which has more words than a thing (ours)."""
_LEAST = 1e-9
"""Cosine by which a word is on one side of a line."""
_CERTAIN = 4
"""Words of a concept, and as many relatives, by which those in doubt are measured (count; ours)."""
_RELATED = frozenset(("form", "spelling", "synonym", "joined", "hyponym"))
"""Relations to a concept by which a word is held against the lower line."""
_RELATIVES = 8
"""Relatives that are watched, and words just outside a neighborhood."""

Drawn: TypeAlias = Callable[[Concept, Sequence[str]], Tensor]
"""Cosine `[w]` between a concept's names and words, as the model draws them."""

Found = Literal["inflection", "lexicon", "token", "member", "drawn"]


@dataclass(frozen=True)
class Neighborhood:
    """Words around concepts, by target, nearest first."""

    near: dict[str, tuple[str, ...]]
    """Inside the neighborhood, `max_words` at most; a word near two goes to the nearer one."""
    surplus: dict[str, tuple[str, ...]]
    """Inside it as well, but more than `max_words`."""
    relatives: dict[str, tuple[str, ...]]
    """Other kinds of the same thing by the lexicon, which must stay."""
    beyond: dict[str, tuple[str, ...]]
    """The first few words outside, which stay as well: what a reader should look at."""
    held: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Words that mean something else and are at risk (`relatives.held_words`), nearest first."""
    borderline: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Outside, by little."""
    sources: Mapping[str, Found] = field(default_factory=dict)
    """Why a word is near: another form of a name, by the lexicon, by the tokenizer's words alone,
    as a member of a category, or as it is drawn."""


@dataclass
class _Place:
    """The nearest concept of a word so far."""

    margin: float
    """How far above its line."""
    target: str
    source: Found


def find_neighbors(
    known: KnownWords,
    concepts: Sequence[Concept],
    config: MiningConfig,
    *,
    keep: Sequence[str] = (),
    spare: Sequence[str] = (),
    key: Callable[[str], Hashable] = folded,
    members: Drawn | None = None,
    progress: bool | None = False,
) -> Neighborhood:
    """Words that mean a concept to the model, and those just outside.

    Args:
        keep: words that are never neighbors, nor are their parts (preserved words and anchors).
        spare: words that are none either, as they are.
        key: equal for words that are the same; named words are not their own neighbors.
        members: cosine `[w]` between a concept's names and words as the model draws them
            (`guidance_cosine`): it is asked for the members of a category, and for words in doubt.
    """
    named = [word for c in concepts for word in (*c.words, c.destination or "")]
    # Words inside a named phrase ("van" in "van gogh") are parts of it, not neighbors.
    parts = [part for phrase in (*named, *keep) for part in (phrase, *phrase.split())]
    names, spared = {key(part) for part in parts}, {key(word) for word in spare}
    taken = names | spared
    best: dict[str, _Place] = {}
    relatives: dict[str, tuple[str, ...]] = {}
    around: dict[str, list[Candidate]] = {}
    with progress_bar(total=len(concepts), desc="neighbors", progress=progress) as bar:
        for concept in concepts:
            every = known.candidates(concept, config.candidates)
            found = around[concept.target] = [c for c in every if key(c.word) not in names]
            # Kinds of one name may be siblings of another.
            own = {folded(c.word) for c in every if c.relation not in ("sibling", "word")}
            kin = tuple(w for w in siblings_of(known, concept) if folded(w) not in own)
            relatives[concept.target] = kin
            free = [w for w in kin if key(w) not in taken]
            found = [c for c in found if key(c.word) not in spared]
            for word, place in _placed(known, concept, found, free, config, members):
                other = best.get(word)
                if other is None or place.margin > other.margin:
                    best[word] = place
            bar.update(1)
    sorted_out = _neighborhood(concepts, best, relatives, taken, key, config)
    inside = (*sorted_out.near.values(), *sorted_out.surplus.values())
    doubtful = [sorted_out.borderline[c.target] for c in concepts if c.kind != "person"]
    gone = [*named, *(word for words in (*inside, *doubtful) for word in words)]
    held = {
        c.target: held_words(known, c, around[c.target], gone=gone, spare=spare, config=config)
        for c in concepts
    }
    return dataclasses.replace(sorted_out, held=held)


def _placed(
    known: KnownWords,
    concept: Concept,
    candidates: Sequence[Candidate],
    relatives: Sequence[str],
    config: MiningConfig,
    members: Drawn | None,
) -> Iterator[tuple[str, _Place]]:
    """Candidates of a concept with how far they lie above their lines."""
    found = [c for c in candidates if c.relation not in _NEVER]
    words = [c.word for c in found]
    if not words:
        return
    score = known.space.cosines(known.rows_of(words), known.rows_of(concept.words)).amax(dim=1)
    margins = score - _lines(known, concept, found, frozenset(relatives), config)
    drawn: dict[int, float] = {}
    if members is not None and concept.kind == "explicit":
        drawn = _members(concept, words, score, margins, config, members)
    elif members is not None and config.borderline:
        drawn = _asked(concept, words, margins, relatives, members, config.borderline)
    outside = 0
    for number in margins.argsort(descending=True, stable=True).tolist():
        candidate, margin = found[number], float(margins[number])
        source: Found = candidate.source
        if number in drawn:
            margin = drawn[number]
            source = "member" if concept.kind == "explicit" else "drawn"
        # Of what is far outside only a few words are told of, of which nothing is known.
        unknown = candidate.relation == "word"
        outside += margin < 0 and unknown
        if margin >= -BORDER or (unknown and outside <= 2 * _RELATIVES):
            yield candidate.word, _Place(margin, concept.target, source)


_NEVER = frozenset(("named", "part"))


def _lines(
    known: KnownWords,
    concept: Concept,
    found: Sequence[Candidate],
    relatives: frozenset[str],
    config: MiningConfig,
) -> Tensor:
    """`[n]` least cosine at which each candidate is a neighbor."""
    unknown = known.line_of_unknown(config.word_cosine)
    related = min(unknown, known.line.related)
    # What a thing is a kind of has other kinds, and a person is nobody else, unless the model
    # hardly tells them apart.
    above, certain = hypernyms_of(known, concept), (1.0 + unknown) / 2

    def line_of(candidate: Candidate) -> float:
        if candidate.relation == "spelling":
            # Another way to write the name is the name.
            return -1.0
        if candidate.relation in _RELATED:
            return related
        if candidate.word.lower() in above:
            return certain
        sibling = candidate.relation == "sibling" or candidate.word.lower() in relatives
        if concept.kind == "person" and sibling:
            return certain
        return unknown

    lines = [line_of(candidate) for candidate in found]
    return torch.tensor(lines, dtype=torch.float64, device="cpu")


def _members(
    concept: Concept,
    words: Sequence[str],
    score: Tensor,
    margins: Tensor,
    config: MiningConfig,
    members: Drawn,
) -> dict[int, float]:
    """Margins of those words, by number, that the model draws as members of a category."""
    near = score.argsort(descending=True)[: config.member_words].tolist()
    if not near:
        return {}
    drawn = members(concept, [words[number] for number in near]).double() - config.member_cosine
    return {
        number: float(margin)
        for number, margin in zip(near, drawn, strict=True)
        if margin >= 0 and margin > margins[number]
    }


def _asked(
    concept: Concept,
    words: Sequence[str],
    margins: Tensor,
    relatives: Sequence[str],
    members: Drawn,
    most: int,
) -> dict[int, float]:
    """Margins of words in doubt, by number: on the side of the line where they are drawn, which is
    beyond the middle between the concept's certain neighbors and its relatives."""
    order = margins.argsort(descending=True, stable=True).tolist()
    certain = [n for n in order if margins[n] > BORDER][:_CERTAIN]
    doubtful = sorted(
        (n for n in order if abs(margins[n]) <= BORDER), key=lambda n: abs(float(margins[n]))
    )[:most]
    shown = [words[number] for number in (*certain, *doubtful)]
    kin = [word for word in relatives if word not in shown][:_CERTAIN]
    if not (certain and doubtful and kin):
        return {}
    cosines = members(concept, [*shown, *kin]).double()
    same, other = cosines[: len(certain)], cosines[len(shown) :]
    # What was not finite says nothing.
    middle = (same[same.isfinite()].mean() + other[other.isfinite()].mean()) / 2
    if not same[same.isfinite()].mean() > middle:
        return {}
    return {
        number: max(abs(float(margins[number])), _LEAST) * (1 if cosine >= middle else -1)
        for number, cosine in zip(doubtful, cosines[len(certain) : len(shown)], strict=True)
        if cosine.isfinite()
    }


def _ranked(words: Sequence[tuple[float, str]], names: set[str]) -> tuple[str, ...]:
    """Words by their margins, the nearest first. Phrases that hold a name come last: its own rows
    reach them, and where there are too many words others have the room."""
    return tuple(
        word
        for _, _, word in sorted(
            ((names.isdisjoint(word.split()), margin, word) for margin, word in words), reverse=True
        )
    )


def _neighborhood(
    concepts: Sequence[Concept],
    best: Mapping[str, _Place],
    relatives: Mapping[str, Sequence[str]],
    taken: set[Hashable],
    key: Callable[[str], Hashable],
    config: MiningConfig,
) -> Neighborhood:
    inside: dict[str, list[tuple[float, str]]] = {c.target: [] for c in concepts}
    outside: dict[str, list[tuple[float, str]]] = {c.target: [] for c in concepts}
    sources: dict[str, Found] = {}
    for word, place in best.items():
        if place.margin >= 0:
            inside[place.target].append((place.margin, word))
        else:
            outside[place.target].append((place.margin, word))
            sources[word] = place.source
    names = {
        c.target: {part for word in c.words for part in (word, *word.split())} for c in concepts
    }
    around = {target: _ranked(words, names[target]) for target, words in inside.items()}
    beyond = {t: sorted(w, reverse=True) for t, w in outside.items()}
    gone = {word for words in around.values() for word in words}
    stay = {
        target: tuple(word for word in words if word not in gone and key(word) not in taken)
        for target, words in relatives.items()
    }
    most = {
        c.target: config.max_words * (_CATEGORY if c.kind == "explicit" else 1) for c in concepts
    }
    return Neighborhood(
        near={target: words[: most[target]] for target, words in around.items()},
        surplus={target: words[most[target] :] for target, words in around.items()},
        relatives={target: words[:_RELATIVES] for target, words in stay.items()},
        beyond={
            target: tuple(word for _, word in words if sources[word] == "token")[:_RELATIVES]
            for target, words in beyond.items()
        },
        borderline={
            target: tuple(word for margin, word in words if margin >= -BORDER)
            for target, words in beyond.items()
        },
        sources={word: best[word].source for word in gone},
    )
