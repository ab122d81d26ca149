"""Words of the vocabulary that follow a concept."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from realera_fast import mining
from realera_fast.runtime import folded, progress_bar
from realera_fast.text import Concept, Text, Vocabulary, describe

_RELATIVES = 3
"""Words just outside a neighborhood that are named in the report."""
_TOGETHER = 32
"""Concepts that are described together."""


@dataclass(frozen=True)
class Neighborhood:
    """Words of the tokenizer around concepts, by target, nearest first."""

    near: dict[str, tuple[str, ...]]
    """Inside the neighborhood, `max_words` at most; a word near two goes to the nearer one."""
    surplus: dict[str, tuple[str, ...]]
    """Inside it as well, but more than `max_words`."""
    relatives: dict[str, tuple[str, ...]]
    """The first few outside of it: what a reader should look at."""


def neighbor_words(
    text: Text,
    vocabulary: Vocabulary,
    concepts: Sequence[Concept],
    config: mining.MiningConfig,
    *,
    keep: Sequence[str] = (),
    key: Callable[[str], Hashable] = folded,
    members: Callable[[Concept, Sequence[str]], Tensor] | None = None,
    progress: bool | None = False,
) -> Neighborhood:
    """Words of the tokenizer that lie in the neighborhood of each concept, and just outside.

    Args:
        keep: words that are never neighbors (preserved words and anchors).
        key: equal for words that are the same; named words are not their own neighbors.
        members: cosine `[w]` between a category and words as the model draws them
            (`members.guidance_cosine`); asked for concepts of kind "explicit".
    """
    found: dict[str, list[tuple[float, str]]] = {c.target: [] for c in concepts}
    beyond: dict[str, list[tuple[float, str]]] = {c.target: [] for c in concepts}
    if not vocabulary.words or not concepts:
        nothing: dict[str, tuple[str, ...]] = dict.fromkeys(found, ())
        return Neighborhood(nothing, nothing, nothing)
    named = [word for c in concepts for word in (*c.words, c.destination or "")]
    # Words inside a named phrase ("van" in "van gogh") are parts of it, not neighbors.
    parts = [part for phrase in (*named, *keep) for part in (phrase, *phrase.split())]
    taken = {key(part) for part in parts}
    # Other spellings of what is erased can be neighbors, but nothing that is to be kept.
    spelled = {folded(word) for c in concepts for word in c.words}
    best = torch.full((len(vocabulary.words),), -torch.inf, dtype=torch.float64, device="cpu")
    owner = torch.zeros(len(vocabulary.words), dtype=torch.long, device="cpu")
    known = torch.tensor([key(word) in taken for word in vocabulary.words], device="cpu")
    with progress_bar(total=len(concepts), desc="neighbors", progress=progress) as bar:
        for start in range(0, len(concepts), _TOGETHER):
            part = concepts[start : start + _TOGETHER]
            described = describe(text, [word for concept in part for word in concept.words])
            own = described.split([len(concept.words) for concept in part])
            for place, rows in enumerate(own, start=start):
                score = _similarity(vocabulary, rows, ~known, config).double()
                asked = config.member_words if concepts[place].kind == "explicit" else 0
                if members is not None and asked:
                    near = score.masked_fill(known, -torch.inf).argsort(descending=True)
                    near = near[: min(asked, int((~known).sum()))]
                    drawn = members(concepts[place], [vocabulary.words[int(i)] for i in near])
                    fits = drawn >= config.member_cosine
                    near, drawn = near[fits], drawn[fits].double()
                    # From [member_cosine, 1] to [word_cosine, 1], as words are compared by it.
                    way = (drawn - config.member_cosine) / max(1.0 - config.member_cosine, 1e-6)
                    way = config.word_cosine + (1.0 - config.word_cosine) * way.clamp(0.0, 1.0)
                    score[near] = torch.maximum(score[near], way)
                owner[score > best] = place
                best = torch.maximum(best, score)
            bar.update(len(part))
    for index, word in enumerate(vocabulary.words):
        inside = float(best[index]) >= config.word_cosine
        if not known[index] and (inside or folded(word) not in spelled):
            into = found if inside else beyond
            into[concepts[int(owner[index])].target].append((float(best[index]), word))

    def nearest(words: list[tuple[float, str]]) -> tuple[str, ...]:
        return tuple(word for _, word in sorted(words, reverse=True))

    around = {target: nearest(words) for target, words in found.items()}
    return Neighborhood(
        {target: words[: config.max_words] for target, words in around.items()},
        {target: words[config.max_words :] for target, words in around.items()},
        {target: nearest(words)[:_RELATIVES] for target, words in beyond.items()},
    )


def _similarity(
    vocabulary: Vocabulary,
    named: Tensor,
    free: Tensor,
    config: mining.MiningConfig,
) -> Tensor:
    """`[w]` how near each word of the vocabulary is to a concept; from `word_cosine` on a neighbor.

    Looked at twice: words that are near the named ones say, together with them, more clearly where
    the concept is than a single word does (pseudo-relevance feedback, Rocchio 1971).

    Args:
        named: `[n, d]` descriptors of the concept's words.
        free: `[w]` which words can be neighbors.
    """
    first = vocabulary.similarity(named.mean(dim=0)).cpu()
    near = ((first >= config.word_cosine) & free).nonzero()[:, 0]
    near = near[first[near].argsort(descending=True)][: config.max_words]
    if not len(near):
        return first
    found = vocabulary.descriptors[near.to(vocabulary.descriptors.device)]
    center = torch.cat([named, found.to(named.device)]).mean(dim=0)
    return torch.maximum(first, vocabulary.similarity(center).cpu())
