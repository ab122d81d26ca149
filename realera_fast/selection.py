"""Who goes, who follows and who stays: the words of one erasure."""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from realera_fast.erasure import applied, originals_of, report
from realera_fast.inputs import Job, name_key
from realera_fast.mining import (
    Anchor,
    KnownWords,
    Line,
    MemberSearch,
    Neighborhood,
    choose_anchors,
    find_neighbors,
    guidance_cosine,
)
from realera_fast.models import streams
from realera_fast.runtime import folded
from realera_fast.text import (
    Concept,
    ConceptPrompts,
    PairsConfig,
    Text,
    Vocabulary,
    fill,
    read_text_rows,
)

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
    line: Line
    """How near is near in this model."""
    anchors: Mapping[str, Anchor] = field(default_factory=dict)
    """What concepts become that name no anchor, by target; the default of their kind where nothing
    is said."""
    _made: dict[tuple[Text, bool], ConceptPrompts] = field(
        default_factory=dict, repr=False, compare=False
    )

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

    @property
    def watched(self) -> list[str]:
        """Words that should not move and are looked at for drift: these, and relatives."""
        return list(dict.fromkeys((*self.staying, *self.relatives)))

    @functools.cached_property
    def held(self) -> list[str]:
        """Words at risk, which are held in place beside the prior."""
        leaving = {folded(word) for word in self.leaving}
        every = {word for words in self.neighborhood.held.values() for word in words}
        # In an order that does not depend on how the model sees them.
        return sorted(w for w in every if folded(w) not in leaving and w not in self.retained)

    @functools.cached_property
    def relatives(self) -> list[str]:
        """Other kinds of what leaves, which stay, of many concepts an even sample."""
        leaving = {folded(word) for word in self.leaving}
        every = (w for words in self.neighborhood.relatives.values() for w in words)
        found = [word for word in dict.fromkeys(every) if folded(word) not in leaving]
        return found[:: max(1, math.ceil(len(found) / _SAMPLED))]

    def prompts(self, text: Text, *, whole: bool = True) -> ConceptPrompts:
        """Of the named words, then of those that follow them; made once for a text.

        Args:
            whole: with all of their padding, as whoever draws from them must have it.
        """
        if (text, whole) not in self._made:
            self._made[text, whole] = self._prompts(text, self.mined, whole)
        return self._made[text, whole]

    def anchor_words(self, concept: Concept) -> tuple[str, ...]:
        """Words whose average a concept becomes; none for the mean word."""
        chosen = self.anchors.get(concept.target)
        if chosen:
            return chosen.words
        return () if concept.destination is None else (concept.destination,)

    def anchor_row(self, known: KnownWords, concept: Concept) -> Tensor:
        """`[d]` float32 row of what a concept becomes."""
        words = self.anchor_words(concept)
        return known.rows_of(words).mean(dim=0) if words else known.space.mean.float()

    def anchor_name(self, concept: Concept) -> str:
        """What a concept becomes, in words."""
        return " or ".join(filter(None, self.anchor_words(concept))) or concept.anchor_name

    def named_prompts(self, text: Text) -> ConceptPrompts:
        """Of the named words alone."""
        return self._prompts(text, {}, whole=True)

    def watched_prompts(self, text: Text) -> ConceptPrompts:
        """Of the named words, then of words near them, which follow or not."""
        return self._prompts(text, self.neighborhood.near, whole=True)

    def _prompts(
        self, text: Text, neighbors: Mapping[str, Sequence[str]], whole: bool
    ) -> ConceptPrompts:
        return ConceptPrompts(
            text,
            self.concepts,
            neighbors,
            self.pairs,
            avoid=self.leaving,
            words=self.vocabulary.words,
            anchors={target: anchor.words for target, anchor in self.anchors.items()},
            whole=whole,
        )


_SAMPLED = 64
"""Words of the vocabulary that are looked at for drift."""


def select(job: Job, known: KnownWords, vocabulary: Vocabulary, *, drawn: bool = True) -> Selection:
    """Decides what happens to each word.

    Args:
        known: what the model may know.
        drawn: whether members of a category are looked for, which takes passes of the denoiser.
        vocabulary: of the first section of the token sequence.
    """
    key = name_key(job.texts)
    named = {c.destination: c.kind for c in job.concepts if c.destination}
    kinds = {key(word): kind for word, kind in named.items()}
    first: dict[Any, str] = {}
    for word in (*job.preserve, *named):
        first.setdefault(key(word), word)
    retained = {word: kinds.get(key(word), "object") for word in first.values()}
    neighborhood = find_neighbors(
        known,
        job.concepts,
        job.config.mining,
        keep=tuple(retained),
        spare=(*job.config.mining.spare, *job.config.vocabulary.exclude),
        key=key,
        members=_member_search(job) if drawn and job.denoising.drawable else None,
        progress=job.progress,
    )
    excluded = {folded(word) for word in job.config.vocabulary.exclude}
    neighborhood = dataclasses.replace(
        neighborhood,
        near=_fitting(job, neighborhood.near),
        held={
            target: tuple(word for word in words if folded(word) not in excluded)
            for target, words in neighborhood.held.items()
        },
    )
    mined: Mapping[str, tuple[str, ...]] = {c.target: () for c in job.concepts}
    if job.config.mining.mode == "vocabulary":
        mined = neighborhood.near
    around = (neighborhood.near, neighborhood.surplus, neighborhood.borderline)
    gone = [word for found in around for words in found.values() for word in words]
    gone += [word for concept in job.concepts for word in concept.words]
    anchors: Mapping[str, Anchor] = {}
    if job.config.pairs.anchors == "auto":
        anchors = choose_anchors(known, job.concepts, gone=gone)
    retained = _with_anchors(job, retained, anchors)
    return Selection(
        concepts=job.concepts,
        neighborhood=neighborhood,
        mined=mined,
        retained=retained,
        vocabulary=vocabulary,
        pairs=job.config.pairs,
        line=known.line,
        anchors=anchors,
    )


def _fitting(job: Job, near: Mapping[str, Sequence[str]]) -> dict[str, tuple[str, ...]]:
    """Mined words for which every text encoder has room in one of the templates."""
    texts = [text for sections in job.texts.values() for text in sections]
    found = {}
    for concept in job.concepts:
        templates = job.config.pairs.of(concept.kind)
        plain = [t for t in templates if "{word}" not in t] or templates
        words = near[concept.target]
        found[concept.target] = tuple(
            word
            for word in words
            if all(any(not text.overflow(fill(t, word)) for t in plain) for text in texts)
        )
        if len(found[concept.target]) < len(words):
            long = [word for word in words if word not in found[concept.target]]
            logger.info("neighbors of %r that no template has room for: %s", concept.target, long)
    return found


def _with_anchors(
    job: Job, retained: Mapping[str, str], anchors: Mapping[str, Anchor]
) -> dict[str, str]:
    """Words that stay: of anchors those that something becomes."""
    key = name_key(job.texts)
    aims = {c.destination for c in job.concepts if c.target not in anchors}
    defaults = {c.destination for c in job.concepts if c.anchor is None} - aims - {*job.preserve}
    found = {word: kind for word, kind in retained.items() if word not in defaults}
    known = {key(word) for word in found}
    for concept in job.concepts:
        chosen = anchors.get(concept.target)
        for word in chosen.words if chosen else ():
            if key(word) not in known:
                known.add(key(word))
                found[word] = concept.kind
    return found


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
    for concept in selection.concepts:
        target = concept.target
        names = {part for word in concept.words for part in (word, *word.split())}
        surplus = selection.neighborhood.surplus[target]
        # The rows of a name reach phrases that hold it.
        words = [word for word in surplus if names.isdisjoint(word.split())]
        if words and selection.mined[target]:
            text = (
                f"{target!r}: {len(words)} words of its neighborhood, {words[0]!r} the nearest of "
                "them, were too many to be erased with it: raise mining.max_words"
            )
            logger.warning(text)
            yield text


def warn_of_words(job: Job, selection: Selection) -> Iterator[str]:
    """Warns of words that the text encoders see otherwise than the user, and of a tokenizer that
    marks none."""
    concepts, retained = selection.concepts, tuple(selection.retained)
    mined = [word for words in selection.mined.values() for word in words]
    yield from _spelled(concepts, (*mined, *retained), name_key(job.texts))
    yield from _unknown(concepts, job.texts)
    yield from _retained_in_part(concepts, retained, job.texts)
    if not selection.vocabulary.words:
        logger.warning(_NO_WORDS)
        yield _NO_WORDS


_NO_WORDS = (
    "the vocabulary is empty: the tokenizer marks no whole words (or vocabulary.words is 0), so "
    "nothing but preserve=, anchors and relatives are held in place; name what must stay"
)


def warn_of_stack(
    job: Job,
    selection: Selection,
    before: Mapping[str, Tensor],
    edited: Mapping[str, Tensor],
    prompt: str,
) -> Iterator[str]:
    """Warns of words that should stay and moved too far with the erasures before this one.

    Each erasure keeps what the model says at the time, so that their side effects add up.

    Args:
        before, edited: `[o, d]` weights before and after this erasure, by layer name.
        prompt: a template; words are read in it.
    """
    originals, kinds = originals_of(job.model), streams(job.model, job.family.maps)
    names = [name for name in edited if kinds.get(name) == "sequence"]
    earlier = applied(job.model) if originals else ()
    if not earlier:
        return
    gone = {folded(w) for erasure in earlier for c in erasure.concepts for w in c.words}
    for erasure in earlier:
        gone |= {folded(w) for words in erasure.report.get("neighbors", {}).values() for w in words}
    staying = [word for word in selection.watched if folded(word) not in gone]
    first = (originals[n].to(before[n]) if n in originals else before[n] for n in names)
    movement = report.Movement(first, (edited[n] for n in names))
    read = read_text_rows(job.text, [fill(prompt, word) for word in staying])
    drifts = sorted(zip(movement.drifts(*read), staying, strict=True), reverse=True)
    far = [f"{word!r} {drift:.2f}" for drift, word in drifts if drift > report.DRIFTED]
    if far:
        text = (
            f"erasures on top of each other add up: since the first of {len(earlier) + 1} "
            f"{len(far)} of {len(staying)} words that should stay moved, in distances between "
            f"words: {', '.join(far[:6])}; pass those before as extends=, so that all go in one"
        )
        logger.warning(text)
        yield text


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
