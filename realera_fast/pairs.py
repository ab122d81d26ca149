"""Prompts of a concept and of its anchor, encoded and aligned row by row (method: "Pairs").

    "a photo of a cat"      <bos> a photo of a  cat  <eos> <pad> ...
                                  |   |   | |    |     |     |
    "a photo of a dog"      <bos> a photo of a  dog  <eos> <pad> ...

Prefix rows meet prefix rows, concept token i meets anchor token min(i, last), end-of-text meets
end-of-text, and padding meets padding at the same distance from end-of-text. The begin-of-text row
is the same vector for every prompt and carries no weight.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from realera_fast.concepts import Concept
from realera_fast.text import TextModel

logger = logging.getLogger(__name__)

TEMPLATES: Mapping[str, tuple[str, ...]] = {
    "object": (
        "{}",
        "a {}",
        "a photo of a {}",
        "a picture of a {}",
        "a photo of the {}",
        "a drawing of a {}",
        "an image of a {}",
        "a {} next to a {word}",
    ),
    "style": (
        "{}",
        "{} style",
        "a picture in the style of {}",
        "a {word} in the style of {}",
        "a {} picture of a {word}",
        "a {} style {word}",
    ),
    "person": (
        "{}",
        "a photo of {}",
        "a portrait of {}",
        "a picture of {}",
        "an image of {}",
        "a photo of {} with a {word}",
    ),
    "explicit": ("{}", "a photo of {}", "a picture of {}", "an image of {}", "{} and {word}"),
}
"""Prompt templates by kind. `{}` is the concept; `{word}` is filled with words of the tokenizer."""


@dataclass(frozen=True)
class PairsConfig:
    """How concepts are put into prompts."""

    templates: Mapping[str, tuple[str, ...]] | None = None
    """Templates by kind, each with one `{}`; kinds left out keep theirs. Default: `TEMPLATES`
    (ours; MACE uses 30 templates a kind, UCE the bare phrase)."""

    context_words: int = 16
    """Words of the tokenizer's vocabulary put into each `{word}` template (count; ours)."""

    def __post_init__(self) -> None:
        if self.context_words < 0:
            raise ValueError(f"context_words must be >= 0, got {self.context_words}")
        for kind, templates in (self.templates or {}).items():
            if kind not in TEMPLATES:
                raise ValueError(f"templates: unknown kind {kind!r}; expected {tuple(TEMPLATES)}")
            if isinstance(templates, str) or not templates:
                raise ValueError(f"templates[{kind!r}] must be a non-empty tuple of strings")
            for template in templates:
                if template.count("{}") != 1:
                    raise ValueError(f"templates[{kind!r}]: {template!r} needs exactly one {{}}")

    def of(self, kind: str) -> tuple[str, ...]:
        """The templates of one kind."""
        return tuple((self.templates or {}).get(kind, TEMPLATES[kind]))


@dataclass(frozen=True)
class AlignedPrompts:
    """One word of a concept in every template, beside its anchor."""

    word: str
    """The target, or a synonym or neighbor word that follows the same anchor."""
    prompts: tuple[str, ...]
    anchor_prompts: tuple[str, ...]
    source: Tensor
    """`[p, t, d]` float32: the prompts' embeddings."""
    destination: Tensor
    """`[p, t, d]` float32: for every source row, the anchor row that it is to become."""
    anchor: Tensor
    """`[p, t, d]` float32: the anchor prompts as encoded, unaligned: what the teacher is shown."""
    weight: Tensor
    """`[p, t]` float32: 0 for begin-of-text, else the same for all rows; sums to 1."""


def fill(template: str, word: str, context: str = "") -> str:
    """A prompt; an empty word leaves no double space behind."""
    return " ".join(template.replace("{word}", context).replace("{}", word).split())


def prompts_of(
    word: str, templates: Sequence[str], context: Sequence[str] = ()
) -> tuple[tuple[str, str, str], ...]:
    """`(prompt, template, context word)` for every template and, where it has one, context word."""
    return tuple(
        (fill(template, word, extra), template, extra)
        for template in templates
        for extra in (context if "{word}" in template else ("",))
    )


def _rows(source_span: tuple[int, int], source_end: int, anchor_span: tuple[int, int],
          anchor_end: int, tokens: int) -> list[int]:
    """For each source position the anchor position it is aligned with."""
    start, stop = source_span
    anchor_start, anchor_stop = anchor_span
    positions = []
    for position in range(tokens):
        if position < start:
            aligned = position
        elif position < stop:
            # An empty anchor has no tokens of its own: what follows it (often end-of-text) stands in.
            aligned = min(anchor_start + position - start, max(anchor_stop - 1, anchor_start))
        elif position <= source_end:
            aligned = anchor_end - (source_end - position)
        else:
            aligned = anchor_end + (position - source_end)
        positions.append(min(aligned, tokens - 1))
    return positions


def align(
    text: TextModel,
    word: str,
    anchor: str,
    templates: Sequence[str],
    *,
    context: Sequence[str] = (),
) -> AlignedPrompts:
    """Encodes a word and its anchor in every template and aligns their rows.

    Templates in which the prompt is longer than the encoder holds are left out with a log message.

    Raises:
        ValueError: the word fits in no template; the message says what would be cut.
    """
    kept = []
    cut = ""
    for prompt, template, extra in prompts_of(word, templates, context):
        anchor_prompt = fill(template, anchor, extra)
        over = text.overflow(prompt) or text.overflow(anchor_prompt)
        if over:
            cut = over
            logger.info("template %r is too long for %r: %r would be cut", template, word, over)
        else:
            kept.append((prompt, anchor_prompt, len(text.token_ids(fill(template.split("{}")[0], "", extra)))))
    if not kept:
        raise ValueError(
            f"concept {word!r} (anchor {anchor!r}) needs more tokens than the text encoder holds "
            f"({text.max_tokens} with begin- and end-of-text) in every template; {cut!r} would be "
            "cut: use fewer words"
        )
    prompts = tuple(p for p, _, _ in kept)
    anchor_prompts = tuple(a for _, a, _ in kept)
    distinct = list(dict.fromkeys((*prompts, *anchor_prompts)))
    hidden = dict(zip(distinct, text.encode(distinct), strict=True))
    ends = dict(zip(distinct, text.end_of_text(text.tokenize(distinct)).tolist(), strict=True))
    source = torch.stack([hidden[p] for p in prompts])
    anchors = torch.stack([hidden[a] for a in anchor_prompts])
    length, anchor_length = len(text.token_ids(word)), len(text.token_ids(anchor)) if anchor else 0
    index = torch.tensor(
        [
            _rows(
                (1 + prefix, 1 + prefix + length),
                ends[prompt],
                (1 + prefix, 1 + prefix + anchor_length),
                ends[anchor_prompt],
                text.max_tokens,
            )
            for prompt, anchor_prompt, prefix in kept
        ],
        device=source.device,
    )
    destination = torch.gather(anchors, 1, index[..., None].expand_as(anchors))
    rows = len(prompts) * max(1, text.max_tokens - 1)
    weight = torch.full(source.shape[:2], 1.0 / rows, device=source.device)
    weight[:, 0] = 0.0
    return AlignedPrompts(word, prompts, anchor_prompts, source, destination, anchors, weight)


def align_concept(
    text: TextModel, concept: Concept, config: PairsConfig, *, word: str | None = None
) -> AlignedPrompts:
    """`align` for a concept's target (or another `word` that follows the same anchor)."""
    erased = {w.casefold() for w in concept.words}
    context = [w for w in text.words(4 * config.context_words + 8) if w.casefold() not in erased]
    return align(
        text,
        concept.target if word is None else word,
        concept.destination,
        config.of(concept.kind),
        # Evenly over the vocabulary's beginning, where the most common words stand.
        context=context[:: max(1, len(context) // max(1, config.context_words))][
            : config.context_words
        ],
    )
