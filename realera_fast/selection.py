"""Who goes, who follows and who stays: the words of one erasure."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from realera_fast.inputs import Job, name_key
from realera_fast.mining import MemberSearch, Neighborhood, guidance_cosine, neighbor_words
from realera_fast.runtime import folded
from realera_fast.text import Concept, ConceptPrompts, PairsConfig, Text, Vocabulary

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Selection:
    """What an erasure does with each word."""

    concepts: tuple[Concept, ...]
    """What goes."""
    neighborhood: Neighborhood
    """Words of the vocabulary around the concepts, which are not preserved, whoever moves them."""
    mined: Mapping[str, tuple[str, ...]]
    """Those that follow their concept, by target; none unless the mining is of the vocabulary."""
    retained: Mapping[str, str]
    """Words that stay because they were named, as preserved or as anchors; the kind of each."""
    vocabulary: Vocabulary
    pairs: PairsConfig

    @functools.cached_property
    def leaving(self) -> list[str]:
        """Named words and their neighborhoods: what is not preserved."""
        near, surplus = self.neighborhood.near, self.neighborhood.surplus
        return [w for c in self.concepts for w in (*c.words, *near[c.target], *surplus[c.target])]

    @functools.cached_property
    def staying(self) -> list[str]:
        """Words that should not move: retained ones, then an even sample of the vocabulary."""
        leaving = {folded(word) for word in self.leaving}
        rest = [
            word
            for word in self.vocabulary.words
            if folded(word) not in leaving and word not in self.retained
        ]
        return [*self.retained, *rest[:: max(1, math.ceil(len(rest) / _SAMPLED))]]

    def prompts(self, text: Text) -> ConceptPrompts:
        """Of the named words, then of those that follow them."""
        return self._prompts(text, self.mined)

    def watched_prompts(self, text: Text) -> ConceptPrompts:
        """Of the named words, then of words near them, which follow or not."""
        return self._prompts(text, self.neighborhood.near)

    def _prompts(self, text: Text, neighbors: Mapping[str, Sequence[str]]) -> ConceptPrompts:
        return ConceptPrompts(
            text,
            self.concepts,
            neighbors,
            self.pairs,
            avoid=self.leaving,
            words=self.vocabulary.words or None,
        )


_SAMPLED = 64
"""Words of the vocabulary that are looked at for drift."""


def select(job: Job, vocabulary: Vocabulary) -> Selection:
    """Decides what happens to each word.

    Args:
        vocabulary: of the first section of the token sequence.
    """
    key = name_key(job.texts)
    anchors = {c.destination: c.kind for c in job.concepts if c.destination}
    kinds = {key(word): kind for word, kind in anchors.items()}
    first: dict[Any, str] = {}
    for word in (*job.preserve, *anchors):
        first.setdefault(key(word), word)
    retained = {word: kinds.get(key(word), "object") for word in first.values()}
    neighborhood = neighbor_words(
        job.text,
        vocabulary,
        job.concepts,
        job.config.mining,
        keep=tuple(retained),
        key=key,
        members=_member_search(job) if job.denoising.drawable else None,
        progress=job.progress,
    )
    mined: Mapping[str, tuple[str, ...]] = {c.target: () for c in job.concepts}
    if job.config.mining.mode == "vocabulary":
        mined = neighborhood.near
    return Selection(job.concepts, neighborhood, mined, retained, vocabulary, job.config.pairs)


def _member_search(job: Job) -> MemberSearch:
    options, scheduler = job.config.alignment, job.denoising.scheduler
    shown = job.denoiser_text()
    run = job.run_of((options.guidance_scale, options.latent_size, options.mixed_precision))
    return MemberSearch(
        lambda names, words: guidance_cosine(
            job.model,
            scheduler,
            names,
            words,
            text=shown.text,
            empty=shown.empty,
            config=options,
            pooled_width=shown.pooled_width,
        ),
        job.device,
        together=max(1, options.sampling_batch_size // 2),
        execution=job.execution(run),
    )


def warn_of_surplus(selection: Selection) -> Iterator[str]:
    """Warns of neighbors that are too many to be erased."""
    for target, words in selection.neighborhood.surplus.items():
        if words and selection.mined[target]:
            text = (
                f"{target!r}: {len(words)} words of its neighborhood, {words[0]!r} the nearest of "
                "them, were too many to be erased with it: raise mining.max_words"
            )
            logger.warning(text)
            yield text


def warn_of_names(job: Job, selection: Selection) -> Iterator[str]:
    """Warns of words that the text encoders see otherwise than the user."""
    concepts, retained = selection.concepts, tuple(selection.retained)
    mined = [word for words in selection.mined.values() for word in words]
    yield from _spelled(concepts, (*mined, *retained), name_key(job.texts))
    yield from _unknown(concepts, job.texts)
    yield from _retained_in_part(concepts, retained, job.texts)


def warn_of_no_words(selection: Selection) -> Iterator[str]:
    """Warns of a tokenizer that marks no words."""
    if not selection.vocabulary.words:
        logger.warning(_NO_WORDS)
        yield _NO_WORDS


_NO_WORDS = (
    "the vocabulary is empty: the tokenizer marks no whole words (or vocabulary.words is 0), so no "
    "neighbor words are mined and nothing but preserve= and anchors is held in place; name "
    "synonyms, and what must stay"
)


def _spelled(
    concepts: Sequence[Concept], others: Sequence[str], key: Callable[[str], Any]
) -> Iterator[str]:
    """Warns of spellings that the tokenizers tell apart and that nobody named.

    Args:
        others: words beside the named ones that are moved, or kept.
    """
    known = {key(word) for word in (*others, *(w for c in concepts for w in c.words))}
    found: dict[Any, str] = {}
    for word in (word for c in concepts for word in c.words):
        each = " ".join(part[:1].upper() + part[1:] for part in word.split())
        for spelling in (word.lower(), word[:1].upper() + word[1:], each, word.upper()):
            if key(spelling) not in known:
                found.setdefault(key(spelling), spelling)
    if found:
        some = ", ".join(map(repr, list(found.values())[:6])) + (", ..." if len(found) > 6 else "")
        text = (
            f"the text encoder tells spellings of what was erased apart: {some} were not named and "
            "may stay; name those that prompts use as synonyms"
        )
        logger.warning(text)
        yield text


def _unknown(concepts: Sequence[Concept], texts: Mapping[Any, Sequence[Text]]) -> Iterator[str]:
    """Warns of names that are nothing of their own to a text encoder."""
    every = [text for sections in texts.values() for text in sections]
    words = [word for c in concepts for word in c.words]
    if found := [word for word in words if any(text.unknown(word) for text in every)]:
        some = ", ".join(map(repr, found[:6])) + (", ..." if len(found) > 6 else "")
        text = (
            f"the text encoder knows no such characters as in {some}: what else it does not know "
            "looks the same to it and may go as well"
        )
        logger.warning(text)
        yield text


def _retained_in_part(
    concepts: Sequence[Concept], retained: Sequence[str], texts: Mapping[Any, Sequence[Text]]
) -> Iterator[str]:
    """Warns of words to be kept that one of several text encoders can't tell from erased ones."""
    words = [word for c in concepts for word in c.words]
    for text in (text for sections in texts.values() for text in sections):
        gone = {text.name_key(word): word for word in words}
        for word in retained:
            if (other := gone.get(text.name_key(word))) is not None:
                told = (
                    f"{word!r} is to stay and {other!r} to go, which are the same to one of the "
                    "text encoders: it stays in part"
                )
                logger.warning(told)
                yield told
                return
