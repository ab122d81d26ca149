"""Candidates for neighbors of a concept: words that may mean it, from four sources.

What a text encoder thinks of them is not asked here: `related_words` names words, and `TokenSpace`
keeps those whose input embeddings lie near, so that a few hundred a concept need to be encoded.
"""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from realera_fast.text import Concept, Lexicon, TokenWords, run_together

Source = Literal["user", "inflection", "lexicon", "token"]
Relation = Literal[
    "named",
    "part",
    "form",
    "spelling",
    "synonym",
    "hyponym",
    "compound",
    "joined",
    "sibling",
    "homonym",
    "word",
]

_KEPT = frozenset(("named", "form", "spelling", "synonym", "joined"))
"""Relations that need no nearness."""
_KINDS = frozenset(("hyponym", "compound"))
_DEPTH = 4
"""Steps down to kinds of a thing: a machine gun is four below a gun."""
_MOST_WORDS = 3
"""Words of a name that people write as one; longer names are not run together."""
_SHORTEST_PART = 4
"""Letters of a part of a name that alone stands for it in a handle: "trump" in "trumptrain"."""
_RARE = 5
"""Such a part is tagged at most so often in WordNet's texts (count): "west" stands for too much."""
_LEAST_LEFT = 3
"""Letters of a handle beside the name: "artis" and "caro" are no handles."""
_LONG_NAME = 8
"""Letters of a name that is no end of another: "instagram"."""
_LONGEST_PIECE = 3
"""Letters of words that may be left over by accident; those below are no accident."""
_SMALL = frozenset(
    "of in on my is at to we no go be the for and not new old all our you her his with".split()
)
"""Short words of which handles are made."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A word that may mean a concept."""

    word: str
    source: Source
    """Who names it: the user, the lexicon, the tokenizer; or it is another form of a named word."""
    relation: Relation
    """What it is to the concept: "named" itself, a "part" of a name of several words; its plural,
    singular or possessive ("form"), another "spelling", a "synonym"; a kind of it ("hyponym"), or
    of what it is a kind of but named after it ("compound": a sailing ship); a handle in which it is
    "joined"; another kind of the same thing ("sibling"); what else a name may
    mean, or a kind by what that seldom means ("homonym"); a "word" of the tokenizer of which
    nothing is known."""


def related_words(concept: Concept, tokens: TokenWords, lexicon: Lexicon) -> tuple[Candidate, ...]:
    """Words that are known to be related to a concept, the nearest relations first.

    Words that differ in case or accents alone are named once, as the nearer relation has them.
    """
    found: dict[str, Candidate] = {}

    def add(words: Iterable[str], source: Source, relation: Relation) -> None:
        for word in filter(None, words):
            found.setdefault(word.casefold(), Candidate(word, source, relation))

    named, kind = concept.words, concept.kind
    # "Prince" is nobody's kind.
    defined = [
        w for w in named if not (kind == "person" and w != w.lower() and lexicon.is_common(w))
    ]
    add(named, "user", "named")
    for name in named:
        add(lexicon.inflections(name), "inflection", "form")
        add(_spellings(name), "inflection", "spelling")
    for name in defined:
        synonyms = lexicon.synonyms(name, kind)
        add(synonyms, "lexicon", "synonym")
        for synonym in synonyms:
            add(lexicon.inflections(synonym)[:-1], "inflection", "form")
    for name in named:
        add(_handles(name, kind, tokens, lexicon), "token", "joined")
    for name in defined:
        add(lexicon.hyponyms(name, _DEPTH, kind=kind), "lexicon", "hyponym")
        add(lexicon.compounds(name, _DEPTH, kind=kind), "lexicon", "compound")
    for name in defined:
        # Some kinds of one thing the model hardly tells apart; that alone makes them neighbors.
        add(lexicon.siblings(name, kind=kind), "token", "sibling")
        # Which meaning of a word a model knows only the model says.
        add(lexicon.homonyms(name, kind), "token", "homonym")
        add(lexicon.hyponyms(name, _DEPTH, kind=kind, usual=False), "token", "homonym")
    for name in named:
        parts = name.split() if " " in name else []
        add((part for part in parts if len(part) >= _SHORTEST_PART), "user", "part")
    return tuple(found.values())


class TokenSpace:
    """A text encoder's input embeddings, in which candidates are compared before any is encoded.

    A text is the mean of its tokens' embeddings, seen from the mean of the tokenizer's words.

    Args:
        token_ids: tokens of a text without special ones, such as `Text.token_ids`.
        embeddings: `[v, d]` input embeddings of the text encoder by token number, any float dtype
            and device.
    """

    def __init__(
        self, tokens: TokenWords, token_ids: Callable[[str], Sequence[int]], embeddings: Tensor
    ) -> None:
        if embeddings.ndim != 2 or max(tokens.ids, default=0) >= len(embeddings):
            raise ValueError(
                f"embeddings: expected [v, d] with a row for each token up to "
                f"{max(tokens.ids, default=0)}, got {list(embeddings.shape)}; pass the input "
                "embeddings of the encoder that the tokenizer belongs to"
            )
        self._tokens, self._token_ids = tokens, token_ids
        self._single = frozenset(tokens.words)
        self._embeddings = embeddings.detach()
        of_words = self._embeddings[list(tokens.ids)].float()
        rows = of_words if len(of_words) else self._embeddings.float()
        self._mean = rows.mean(dim=0)
        self._words = torch.nn.functional.normalize(of_words - self._mean, dim=-1)

    def directions(self, words: Sequence[str]) -> Tensor:
        """`[w, d]` float32 unit vectors of texts, on the embeddings' device; zeros for those of no
        token."""
        rows = self._mean.repeat(len(words), 1)
        for row, word in zip(rows, words, strict=True):
            if ids := self._token_ids(word):
                row.copy_(self._embeddings[list(ids)].float().mean(dim=0))
        return torch.nn.functional.normalize(rows - self._mean, dim=-1)

    def nearest(
        self, concept: Concept, lexicon: Lexicon, *, most: int = 300
    ) -> tuple[Candidate, ...]:
        """The candidates of a concept that are worth encoding.

        What the user named, its forms and spellings, handles and the lexicon's synonyms stay
        however far they lie: a text that is far may mean the same. So do kinds of a thing until
        they fill half of the room, first those that are tokens of their own, which an encoder has
        learned, then those of the fewest steps down. Of the others those stay whose cosine to one
        of the concept's words is largest.

        Args:
            most: candidates at most, as far as those that stay anyway leave room.

        Returns:
            Those that stay in their order, then the others, the nearest first.
        """
        own = related_words(concept, self._tokens, lexicon)
        kept = [c for c in own if c.relation in _KEPT]
        kinds = [c for c in own if c.relation in _KINDS]
        kinds.sort(key=lambda c: c.word.casefold() not in self._single)
        kept += kinds[: max(0, most - len(kept)) // 2]
        others = [c for c in own if c not in kept]
        known = {c.word.casefold() for c in own}
        free = [i for i, w in enumerate(self._tokens.words) if w.casefold() not in known]
        named = self.directions(concept.words)
        score = torch.cat(
            [self.directions([c.word for c in others]) @ named.T, (self._words @ named.T)[free]]
        ).amax(dim=1)
        near = score.topk(min(max(0, most - len(kept)), len(score))).indices.tolist()
        words = self._tokens.words
        return (
            *kept,
            *(
                others[i]
                if i < len(others)
                else Candidate(words[free[i - len(others)]], "token", "word")
                for i in near
            ),
        )


def _spellings(name: str) -> Iterator[str]:
    """A name run together, with spaces for its hyphens, and without accents."""
    spaced = " ".join(name.replace("-", " ").split())
    if spaced != name:
        yield spaced
    plain = unicodedata.normalize("NFKD", name.replace("\N{RIGHT SINGLE QUOTATION MARK}", "'"))
    plain = "".join(c for c in plain if not unicodedata.combining(c))
    if name.isascii() or plain.isascii():
        # Other scripts change with their marks.
        yield from (plain,) if plain != name else ()
        key = run_together(name)
        if key != name.casefold() and len(spaced.split()) <= _MOST_WORDS:
            yield key


def _handles(name: str, kind: str, tokens: TokenWords, lexicon: Lexicon) -> Iterator[str]:
    """Tokens that are a name run together with other words: "realdonaldtrump", no "catering".

    The token must be no word of the lexicon, and fall into known words of which the name, or a part
    that stands for it, is one; no other way to cut it may take fewer words.
    """
    stems = _stems(name, kind, lexicon)
    if not stems:
        return
    pieces = _Pieces(tokens, lexicon, common=lexicon.is_common(name))
    for word, known in zip(tokens.words, tokens.known, strict=True):
        if known == "name" and any(stem in word and pieces.hold(word, stem) for stem in stems):
            yield word


def _stems(name: str, kind: str, lexicon: Lexicon) -> tuple[str, ...]:
    """What stands for a name within a handle, without case and marks: the longest first."""
    words = name.split()
    forms = (name, *lexicon.inflections(name)[:-1])
    found = [run_together(form) for form in forms]
    for size in range(2, min(len(words), _MOST_WORDS + 1)):
        # Of three words two that stand together: "vangogh".
        runs = (words[at : at + size] for at in range(len(words) - size + 1))
        found += [run_together("".join(run)) for run in runs]
    if len(words) > 1 and kind in ("person", "style"):
        # A last name stands for a person, unless it is a common word; a first name for many.
        last = words[-1]
        found += [run_together(last)] if _is_rare(last, lexicon) else []
    long = (stem for stem in found if len(stem) >= _LONGEST_PIECE)
    return tuple(sorted(dict.fromkeys(long), key=len, reverse=True))


def _is_rare(word: str, lexicon: Lexicon) -> bool:
    return len(word) >= _SHORTEST_PART and lexicon.uses(word) <= _RARE


class _Pieces:
    """Cuts a handle into known words.

    Args:
        common: the name is a common word, which other names may hold by accident: "car" is no part
            of "carlisle", though lisle is a thread. Then only words in use and long names count.
    """

    def __init__(self, tokens: TokenWords, lexicon: Lexicon, *, common: bool) -> None:
        self._words, self._lexicon, self._common = _word_set(tokens), lexicon, common

    def hold(self, word: str, stem: str) -> bool:
        """Whether a handle falls into known words one of which is the stem."""
        if len(word) - len(stem) < _LEAST_LEFT:
            return False
        least = self._count(word, stem)
        without = self._count(word, stem, other=True)
        return least is not None and (without is None or least <= without)

    def _count(self, word: str, stem: str, *, other: bool = False) -> int | None:
        """The fewest words a handle falls into, with the stem as one, or whatever they are."""
        # By end: the fewest pieces up to there, without the stem and with it.
        plain: list[int | None] = [0, *[None] * len(word)]
        held: list[int | None] = [None] * (len(word) + 1)
        for end in range(1, len(word) + 1):
            for start in range(end):
                piece = word[start:end]
                is_stem = piece == stem
                if piece == word or not (is_stem or self._is_piece(piece)):
                    continue
                for table, target in ((plain, held if is_stem else plain), (held, held)):
                    before, now = table[start], target[end]
                    if before is not None and (now is None or before + 1 < now):
                        target[end] = before + 1
        return plain[-1] if other else held[-1]

    def _is_piece(self, piece: str) -> bool:
        if len(piece) <= _LONGEST_PIECE:
            return piece in _SMALL or (
                len(piece) == _LONGEST_PIECE and self._lexicon.uses(piece) > _RARE
            )
        if self._common:
            bases = self._lexicon.lemmas(piece)
            used = any(base.islower() and self._lexicon.uses(base) for base in bases)
            return used or (piece in self._words and len(piece) >= _LONG_NAME and not bases)
        return piece in self._words or self._lexicon.knows(piece)


@functools.lru_cache(maxsize=4)
def _word_set(tokens: TokenWords) -> frozenset[str]:
    return frozenset(tokens.words)
