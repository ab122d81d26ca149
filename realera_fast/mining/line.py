"""Where neighbors of a word end and its relatives begin, for one text encoder and denoiser.

A cosine means another thing in every model, so the line between the two is no constant. The lexicon
knows pairs of words that are kinds of one thing (a cup and a bowl): nearer than all but a few of
these is nearer than a relative. And it knows pairs that have nothing to do with each other: nearer
than all but a few of these is near enough for a word that the lexicon calls a synonym.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from realera_fast.mining.word_space import WordSpace
from realera_fast.text import Lexicon, TokenWords

_PAIRS = {"inflections": 100, "synonyms": 100, "siblings": 400}
"""Pairs that are compared (count; ours): the lines lie by siblings and by strangers, which are
other pairs of the same words."""
_FEWEST = 50
"""Fewer pairs of siblings say nothing (count; ours)."""
_MOST = 2000
"""Words whose distances are all taken (count; ours)."""
_RELATIVES = 0.02
"""Share of siblings that may lie above the line (ours)."""
_STRANGERS = 0.01
"""Share of strangers that may lie above theirs (ours)."""


@dataclass(frozen=True)
class Line:
    """Least cosines of neighbors (`WordSpace`)."""

    unknown: float
    """Of words of which nothing is known: few siblings lie so near each other."""
    related: float
    """Of words that the lexicon or their spelling relates to the concept: few strangers do."""
    source: Literal["lexicon", "vocabulary"]
    """Whose pairs tell. The vocabulary's own distances where the lexicon knows too few words."""
    rates: dict[str, float]
    """Shares of pairs above `unknown` by what they are: inflections, synonyms, siblings,
    strangers; and above `related`, with that word before it."""
    pairs: dict[str, int]
    """How many pairs of each there were."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "unknown": round(self.unknown, 4),
            "related": round(self.related, 4),
            "source": self.source,
            "rates": {name: round(rate, 4) for name, rate in self.rates.items()},
            "pairs": dict(self.pairs),
        }


Pairs = dict[str, list[tuple[str, str]]]


def labelled_pairs(tokens: TokenWords, things: Sequence[str], lexicon: Lexicon) -> Pairs:
    """Pairs of the tokenizer's words, by what the lexicon says of them.

    Args:
        things: those that name things.
    """
    known, rng = set(tokens.words), random.Random(0)
    things = rng.sample(things, len(things))
    pairs: Pairs = {name: [] for name in _PAIRS}
    asked: dict[str, Callable[[str], Sequence[str]]] = {
        "inflections": lambda word: lexicon.inflections(word)[:-1],
        "synonyms": lexicon.synonyms,
        "siblings": lexicon.siblings,
    }
    for word in things:
        for name, ask in asked.items():
            if len(pairs[name]) < _PAIRS[name]:
                # One of each word: a word of many siblings would outweigh the others.
                found = [w for w in map(str.lower, ask(word)) if w in known and w != word]
                pairs[name] += [(word, rng.choice(found))] if found else []
        if all(len(pairs[name]) >= count for name, count in _PAIRS.items()):
            break
    words = sorted({word for pair in pairs["siblings"] for word in pair})
    others = rng.sample(words, len(words))
    related = {frozenset(pair) for part in pairs.values() for pair in part}
    strangers = (pair for pair in zip(words, others, strict=True) if pair[0] != pair[1])
    pairs["strangers"] = [pair for pair in strangers if frozenset(pair) not in related]
    return pairs


def are_enough(pairs: Pairs) -> bool:
    """Whether pairs of siblings say where the line lies."""
    return len(pairs["siblings"]) >= _FEWEST


def words_of(pairs: Pairs) -> list[str]:
    """Every word of the pairs, once."""
    return list(dict.fromkeys(w for part in pairs.values() for pair in part for w in pair))


def calibrate(space: WordSpace, rows: Tensor, words: Sequence[str], pairs: Pairs) -> Line:
    """The line of a model.

    Args:
        rows: `[w, d]` of `words`, among which those of the pairs are.
        pairs: those of `labelled_pairs`.
    """
    if not are_enough(pairs):
        return _from_distances(space, rows[:: max(1, math.ceil(len(rows) / _MOST))])
    place = {word: number for number, word in enumerate(words)}
    found = {
        name: _pairwise(space, rows, [(place[a], place[b]) for a, b in part])
        for name, part in pairs.items()
    }
    unknown = float(found["siblings"].quantile(1 - _RELATIVES))
    related = min(unknown, float(found["strangers"].quantile(1 - _STRANGERS)))
    rates = {name: _share(part, unknown) for name, part in found.items()}
    rates |= {f"related {name}": _share(part, related) for name, part in found.items()}
    counts = {name: len(part) for name, part in found.items()}
    return Line(unknown, related, "lexicon", rates, counts)


def _from_distances(space: WordSpace, rows: Tensor) -> Line:
    """Where words of one meaning part from others, by how near words of the vocabulary lie.

    Of each word's nearest other one: the two classes that differ least within (Otsu 1979).
    """
    count = len(rows)
    if count < 3:
        return Line(1.0, 1.0, "vocabulary", {}, {"words": count})
    cosines = space.cosines(rows, rows)
    cosines.fill_diagonal_(-math.inf)
    every = cosines[torch.ones_like(cosines, dtype=torch.bool).triu(1)].sort().values
    nearest = cosines.amax(dim=1).sort().values
    unknown = _otsu(nearest)
    related = min(unknown, float(every.quantile(1 - _STRANGERS)))
    rates = {"words": _share(nearest, unknown), "pairs": _share(every, unknown)}
    return Line(unknown, related, "vocabulary", rates, {"words": count})


def _otsu(values: Tensor) -> float:
    """The middle between two classes of `[n]` sorted values, n > 1, by least variance within."""
    count = torch.arange(1, len(values), dtype=torch.float64, device=values.device)
    sums, total = values.cumsum(0)[:-1], values.sum()
    between = (total * count / len(values) - sums).square() / (count * (len(values) - count))
    cut = int(between.argmax())
    return float((values[cut] + values[cut + 1]) / 2)


def _pairwise(space: WordSpace, rows: Tensor, places: Sequence[tuple[int, int]]) -> Tensor:
    """`[p]` cosines of pairs."""
    if not places:
        return torch.zeros(0, dtype=torch.float64, device="cpu")
    left, right = torch.tensor(places, device=rows.device).unbind(1)
    return space.pairwise(rows[left], rows[right])


def _share(values: Tensor, line: float) -> float:
    return float((values >= line).double().mean()) if len(values) else 0.0
