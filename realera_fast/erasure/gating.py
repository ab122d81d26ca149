"""Where the gate of a prompt map opens: calibrated on words that go and words that stay."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from realera_fast.erasure.report import neighbors_of, watched_of
from realera_fast.models import components_of, text_streams
from realera_fast.runtime import folded
from realera_fast.solver import PromptGate
from realera_fast.text import (
    Concept,
    Lexicon,
    PairsConfig,
    Text,
    before_word,
    fill,
    prompts_at_a_time,
    read_text_rows,
    whole_words,
)

if TYPE_CHECKING:
    from realera_fast.erasure.erasure import Erasure

logger = logging.getLogger(__name__)

_WORDS = 500
"""Words of the tokenizer that a gate is calibrated on, evenly from common to rare (count; ours)."""
_SHARE = 0.99
"""Of these words that many should leave a gate shut (ratio; ours): a vocabulary has words of the
concept that nobody listed."""
_TOWARDS = 0.25
"""How far a threshold stands from what stays towards what goes (ratio; ours): a gate that opens for
nothing does what a map without gates does, one that stays shut lets the concept through."""
_MARGIN = 0.02
"""A threshold is at least that far below the least cosine of what goes (cosine; ours)."""
_SAME = 0.98
"""A row that near another one of its concept needs no direction of its own (cosine; ours)."""
_SCENE = "two people and a {} in front of a house"
_STAYING = ("{}", "a photo of a {}", _SCENE)
"""Prompts of words that stay, in turns."""
_NAMED = 6


@dataclass(frozen=True)
class _Gone:
    """What goes with one concept."""

    concept: Concept
    words: tuple[str, ...]
    known: tuple[str, ...]
    """Templates that directions are taken from."""
    judged: tuple[str, ...]
    """Templates that thresholds are taken from: others, where there are."""


def calibrated(erasure: Erasure, pipe: Any) -> list[PromptGate]:
    """Gates for the prompts of an erasure, one for each section of the token sequence.

    Args:
        pipe: a pipeline with the text encoders and the denoiser that it was made for, or anything
            that has them by the same names. Only the width of the text is compared.

    Raises:
        ValueError: the text encoders give another width than the erasure is for, or nothing is
            erased.
    """
    gone = _leaving(erasure)
    if not gone:
        raise ValueError("concepts: this erasure erases nothing, so there is nothing to gate")
    parts = components_of(pipe)
    texts = text_streams(parts.model, parts.text_encoders, parts.tokenizers, erasure.reading)
    sections = texts["sequence"]
    for section in sections:
        if section.width != erasure.map.width:
            raise ValueError(
                f"pipe: its text encoders give {section.width} features, this erasure was made "
                f"for {erasure.map.width}; pass the pipeline that it was made for"
            )
    return [_gate(section, gone, _staying(erasure, section, gone)) for section in sections]


def _leaving(erasure: Erasure) -> list[_Gone]:
    neighbors, found = neighbors_of(erasure.report), []
    templates = erasure.config.get("pairs", {}).get("templates")
    pairs = PairsConfig(templates=templates)
    for concept in erasure.concepts:
        words = dict.fromkeys((*concept.words, *neighbors.get(concept.target, ())))
        every = pairs.of(concept.kind)
        plain = [t for t in every if "{word}" not in t] or [fill(t, "{}") for t in every]
        known = tuple(dict.fromkeys((plain[0], plain[-1])))
        judged = tuple(t for t in plain if t not in known)[:2]
        if concept.kind == "object":
            judged += (_SCENE,)
        found.append(_Gone(concept, tuple(words), known, judged or known))
    return found


def _staying(erasure: Erasure, text: Text, gone: Sequence[_Gone]) -> tuple[list[str], list[str]]:
    """Words that are known to stay, and an even sample of the tokenizer's."""
    leaving = {folded(word) for each in gone for word in each.words}

    def stays(word: str) -> bool:
        return leaving.isdisjoint((folded(word), *folded(word).split()))

    lexicon = Lexicon.load()
    words = [w for w in whole_words(text.first.tokenizer) if lexicon.has(w) and stays(w)]
    sample = words[:: max(1, math.ceil(len(words) / _WORDS))]
    return [w for w in watched_of(erasure.report) if stays(w)], sample


def _gate(text: Text, gone: Sequence[_Gone], staying: tuple[list[str], list[str]]) -> PromptGate:
    """The gate of one section of the token sequence."""
    kept, sample = staying
    prompts = [_short(text, _STAYING[i % 3], w) for i, w in enumerate((*kept, *sample))]
    read = _read(text, prompts)
    center = _mean(read, text)
    directions, owners = _directions(text, gone, center)
    gate = PromptGate(center, directions, torch.ones(len(directions), device=center.device))
    stays = _reached(gate, read)
    always = _always(gate, text)
    thresholds = torch.empty(len(directions), dtype=torch.float32, device="cpu")
    for number, each in enumerate(gone):
        own = torch.tensor([owner == number for owner in owners], device="cpu")
        filled = [_short(text, t, w) for t in each.judged for w in each.words]
        least = float(_reached(gate, _read(text, filled))[:, own].amax(dim=1).min())
        cosines = stays[:, own].amax(dim=1)
        in_all = float(always[own].max())
        # Relatives may be nearer than words of the concept that nobody listed: the map itself holds
        # them in place.
        most = max(in_all, float((cosines[len(kept) :] if sample else cosines).quantile(_SHARE)))
        # Below what goes in any case.
        threshold = min(least - _MARGIN, most + _TOWARDS * (least - most))
        thresholds[own] = threshold
        opens = (cosines >= threshold).nonzero().flatten().tolist()
        words = [(*kept, *sample)[place] for place in opens]
        _tell(each.concept.target, words, every=in_all >= threshold)
    return PromptGate(center.cpu(), directions.cpu(), thresholds)


def _always(gate: PromptGate, text: Text) -> Tensor:
    """`[n]` what rows reach that are in every prompt: begin-of-text and padding."""
    return gate.cosines(text.encode([""]))[0].cpu()


def _tell(target: str, words: Sequence[str], *, every: bool) -> None:
    """Says for which words that stay a gate opens too."""
    if every:
        logger.warning(
            "%r: its gate opens for every prompt, as the text encoder tells its rows from those "
            "of an empty prompt too little; the map acts as one without gates",
            target,
        )
    elif words:
        shown = ", ".join(map(repr, words[:_NAMED]))
        more = f" and {len(words) - _NAMED} more" if len(words) > _NAMED else ""
        logger.info("%r: prompts with %s%s open its gate as well", target, shown, more)


def _directions(text: Text, gone: Sequence[_Gone], center: Tensor) -> tuple[Tensor, list[int]]:
    """`[n, d]` rows of erased words less the mean row, and the number of the concept of each."""
    found: list[Tensor] = []
    owners: list[int] = []
    for number, each in enumerate(gone):
        prompts, places = [], []
        for template in each.known:
            for word in each.words:
                prompt = _short(text, template, word)
                span = text.span(before_word(template), word)
                prompts.append(prompt)
                # A name that was put in without its template begins the prompt.
                fits = prompt == fill(template, word)
                places.append((span if fits else text.span("", word)).stop - 1)
        rows: list[Tensor] = []
        for hidden, _ in _read(text, prompts):
            own = places[len(rows) : len(rows) + len(hidden)]
            last = torch.tensor(own, device=hidden.device)
            rows += hidden[torch.arange(len(hidden), device=hidden.device), last].unbind()
        kept = _distinct(torch.nn.functional.normalize(torch.stack(rows) - center, dim=1))
        found.append(kept)
        owners += [number] * len(kept)
    return torch.cat(found), owners


def _distinct(rows: Tensor) -> Tensor:
    """Rows `[n, d]` of length 1, without those that are near an earlier one."""
    near = (rows @ rows.mT >= _SAME).cpu()
    kept: list[int] = []
    for number in range(len(rows)):
        if not bool(near[number, kept].any()):
            kept.append(number)
    return rows[kept]


def _short(text: Text, template: str, word: str) -> str:
    """A prompt, or the word alone where the template has no room for it."""
    prompt = fill(template, word)
    return word if text.overflow(prompt) else prompt


def _read(text: Text, prompts: Sequence[str]) -> list[tuple[Tensor, Tensor]]:
    """Rows of prompts, and which of them carry text, a block at a time."""
    size = prompts_at_a_time(text)
    return [read_text_rows(text, prompts[i : i + size]) for i in range(0, len(prompts), size)]


def _mean(read: Sequence[tuple[Tensor, Tensor]], text: Text) -> Tensor:
    """`[d]` float32 mean of the rows that carry text; zeros of none."""
    total = torch.zeros(text.width, dtype=torch.float64, device=text.device)
    count = 0
    for hidden, carries in read:
        total += hidden[carries].double().sum(dim=0)
        count += int(carries.sum())
    return (total / max(1, count)).float()


def _reached(gate: PromptGate, read: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """`[p, n]` greatest cosine of each prompt's rows with each direction, on the CPU."""
    found = [torch.zeros(0, len(gate.directions), dtype=torch.float32, device="cpu")]
    for hidden, carries in read:
        # A row that is not there is as one of the others.
        first = carries.int().argmax(dim=1)
        stand_in = hidden[torch.arange(len(hidden), device=hidden.device), first]
        rows = torch.where(carries[..., None], hidden, stand_in[:, None])
        found.append(gate.cosines(rows).cpu())
    return torch.cat(found)
