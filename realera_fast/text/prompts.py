"""Prompts of a concept and of its anchor, encoded and aligned row by row.

The rows that come of it: docs/method.md, section 2.

    "a photo of a cat"      <bos> a photo of a  cat  <eos> <pad> ...
                                  |   |   | |    |     |     |
    "a photo of a dog"      <bos> a photo of a  dog  <eos> <pad> ...

Prefix rows meet prefix rows, concept token i meets anchor token min(i, last), end-of-text meets
end-of-text, and padding meets padding at the same distance from end-of-text. The begin-of-text row
is the same vector for every prompt and carries no weight.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from realera_fast.runtime import check_types, clean, folded, valid_texts
from realera_fast.text.concepts import Concept
from realera_fast.text.encoders import Span, Text

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

    context_words: int = 32
    """Words of the tokenizer's vocabulary put into each `{word}` template (count; ours)."""

    neutral_words: int = 32
    """Words whose average is the mean word, the anchor of concepts without one (count; ours)."""

    negative_guidance: float = 0.75
    """g of a named word's destination a - g (e - a): past the anchor, away from the concept e, so
    that words which nobody names and no vocabulary lists go as well (ratio; ours, ESD's idea, arXiv
    2303.07345, in the closed form). 0 stops at the anchor, as the papers have it and as mined words
    do, which are many and would push the rest away."""

    def __post_init__(self) -> None:
        check_types(self)
        if not 0.0 <= self.negative_guidance < math.inf:
            raise ValueError(
                "PairsConfig.negative_guidance must be finite and at least 0, got "
                f"{self.negative_guidance}"
            )
        for name in ("context_words", "neutral_words"):
            if getattr(self, name) < 0:
                raise ValueError(f"PairsConfig.{name} must be >= 0, got {getattr(self, name)}")
        if self.templates is None:
            return
        if not isinstance(self.templates, Mapping):
            raise TypeError(
                "PairsConfig.templates must be a mapping of kinds to templates, got "
                f"{type(self.templates).__name__}"
            )
        templates = {}
        for kind, given in self.templates.items():
            if kind not in TEMPLATES:
                raise ValueError(f"templates: unknown kind {kind!r}; expected {tuple(TEMPLATES)}")
            some = () if isinstance(given, str) else valid_texts(given, f"templates[{kind!r}]")
            if not some:
                raise ValueError(f"templates[{kind!r}] must be a non-empty tuple of strings")
            templates[kind] = some
            for template in some:
                clean(template, f"templates[{kind!r}]")
                if template.count("{}") != 1:
                    raise ValueError(f"templates[{kind!r}]: {template!r} needs exactly one {{}}")
        object.__setattr__(self, "templates", templates)

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
    """`[p, t, d]` float32: for every source row what it is to become, the anchor's row or a point
    past it."""
    anchor: Tensor
    """`[p, t, d]` float32: the anchor prompts as encoded, unaligned: what the teacher is shown."""
    weight: Tensor
    """`[p, t]` float32: 0 for rows that carry no text (begin-of-text, hidden padding); all
    templates weigh the same, however many context words fill them; sums to 1."""
    plain: int
    """Number of the prompt that says the word most plainly: the longest without a context word."""


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


def _rows(source: Span, source_end: int, anchor: Span, anchor_end: int, tokens: int) -> list[int]:
    """For each source position the anchor position it is aligned with."""
    positions = []
    for position in range(tokens):
        if position < source.start:
            aligned = position
        elif position < source.stop:
            # An empty anchor has no tokens: what follows it (often end-of-text) stands in.
            last = max(anchor.stop - 1, anchor.start)
            aligned = min(anchor.start + position - source.start, last)
        elif position <= source_end:
            aligned = anchor_end - (source_end - position)
        else:
            aligned = anchor_end + (position - source_end)
        positions.append(min(aligned, tokens - 1))
    return positions


@dataclass(frozen=True)
class _Anchor:
    """One anchor prompt."""

    prompt: str
    hidden: Tensor
    """`[t, d]`."""
    span: Span
    """Rows of the anchor in it."""
    end: int
    """Row of its last token."""


AnchorMemo: TypeAlias = dict[object, list[_Anchor]]
"""Encoded anchors, kept between words that share one."""


def _anchors(
    text: Text, anchor: str | None, filled: Sequence[tuple[str, str]], neutral: Sequence[str]
) -> list[_Anchor]:
    """The anchor in each `(template, context word)`; `None` is the mean over `neutral` words."""
    # A tokenizer that offers no words leaves the prompt without the concept as the neutral one.
    words = [anchor or ""] if anchor is not None or not neutral else list(neutral)
    if len(words) > 1:
        # Rows of words of one length stand at the same places.
        lengths = [len(text.token_ids(word)) for word in words]
        words = [w for w, n in zip(words, lengths, strict=True) if n == min(lengths)]
    prompts = [fill(template, word, extra) for template, extra in filled for word in words]
    distinct = list(dict.fromkeys(prompts))
    rows = dict(zip(distinct, text.encode(distinct), strict=True))
    ends = dict(zip(distinct, text.ends(distinct), strict=True))
    found = []
    for number, (template, extra) in enumerate(filled):
        part = prompts[number * len(words) : (number + 1) * len(words)]
        label = part[0] if len(words) == 1 else fill(template, "<mean word>", extra)
        hidden = torch.stack([rows[prompt] for prompt in part]).mean(dim=0)
        span = text.span(_before(template, extra), words[0])
        found.append(_Anchor(label, hidden, span, ends[part[0]]))
    return found


def _before(template: str, context: str) -> str:
    """What stands in front of the word in a filled template."""
    text = template.split("{}")[0].replace("{word}", context)
    return " ".join(text.split()) + (" " if text.endswith(" ") else "")


def align(
    text: Text,
    word: str,
    anchor: str | None,
    templates: Sequence[str],
    *,
    context: Sequence[str] = (),
    neutral: Sequence[str] = (),
    negative_guidance: float = 0.0,
    memo: AnchorMemo | None = None,
) -> AlignedPrompts:
    """Encodes a word and its anchor in every template and aligns their rows.

    Templates in which the prompt is longer than the encoder holds are left out with a log message.

    Args:
        anchor: what the word becomes; `None` is the mean over `neutral`, words of one token each.
        context: words put into `{word}` templates.
        negative_guidance: how far past the anchor destinations lie (`PairsConfig`).
        memo: keeps encoded anchors between calls, for words that share one.

    Raises:
        ValueError: the word fits in no template; the message says what would be cut.
    """
    kept = []
    cut = ""
    longest = neutral[0] if anchor is None and neutral else anchor or ""
    for prompt, template, extra in prompts_of(word, templates, context):
        over = text.overflow(prompt) or text.overflow(fill(template, longest, extra))
        if over:
            cut = over
            logger.info("template %r is too long for %r: %r would be cut", template, word, over)
        else:
            kept.append((prompt, template, extra))
    if not kept:
        raise ValueError(
            f"concept {word!r} (anchor {anchor!r}) needs more tokens than the text encoder holds "
            "(special tokens included) in every template; "
            f"{cut!r} would be cut: use fewer words"
        )
    prompts = tuple(prompt for prompt, _, _ in kept)
    filled = tuple((template, extra) for _, template, extra in kept)
    memo = {} if memo is None else memo
    key = (anchor, filled, tuple(neutral))
    if key not in memo:
        memo[key] = _anchors(text, anchor, filled, neutral)
    anchors = memo[key]
    source = text.encode(prompts)
    index = []
    for (_, template, extra), end, found in zip(kept, text.ends(prompts), anchors, strict=True):
        span = text.span(_before(template, extra), word)
        index.append(_rows(span, end, found.span, found.end, text.max_tokens))
    hidden = torch.stack([found.hidden for found in anchors])
    place = torch.tensor(index, device=hidden.device)
    destination = torch.gather(hidden, 1, place[..., None].expand_as(hidden))
    if negative_guidance:
        destination = torch.lerp(source, destination, 1.0 + negative_guidance)
    times = Counter(template for _, template, _ in kept)
    share = torch.tensor(
        [1.0 / (len(times) * times[t]) for _, t, _ in kept], dtype=torch.float64, device="cpu"
    )
    weight = (share[:, None] * text.shares(prompts)).to(source.device, torch.float32)
    plain = max(range(len(kept)), key=lambda i: ("{word}" not in kept[i][1], len(prompts[i])))
    names = tuple(found.prompt for found in anchors)
    return AlignedPrompts(word, prompts, names, source, destination, hidden, weight, plain)


_ANCHORS = 4
"""Anchors kept at a time."""


class ConceptPrompts(Sequence[AlignedPrompts]):
    """Prompts of all words of all concepts, encoded when asked for and then forgotten.

    The named words come first, concept by concept, then the mined neighbor words. Memory is that of
    one word's prompts and of a few anchors, however many concepts there are; words of one concept
    are best asked for one after the other, as they share its anchor.
    """

    def __init__(
        self,
        text: Text,
        concepts: Sequence[Concept],
        neighbors: Mapping[str, Sequence[str]],
        config: PairsConfig,
        *,
        avoid: Sequence[str] = (),
        words: Sequence[str] | None = None,
    ) -> None:
        """
        Args:
            neighbors: mined words by target.
            words: what `{word}` templates and the mean word are made of; `None` asks the tokenizer.
            avoid: words that stand neither in `{word}` templates nor in the mean word, such as the
                concepts' own neighbors.
        """
        self._text, self._config, self.concepts = text, config, tuple(concepts)
        left_out = {folded(w) for w in (*avoid, *(w for c in concepts for w in c.words))}
        every = text.words(1000) if words is None else words
        usable = [w for w in every if folded(w) not in left_out]
        self._context = _spread(usable, config.context_words)
        self._neutral = _spread(usable, config.neutral_words)
        named = [(i, word) for i, concept in enumerate(concepts) for word in concept.words]
        self.named = len(named)
        """How many of the words were named."""
        self._words = named + [
            (i, word)
            for i, concept in enumerate(concepts)
            for word in neighbors.get(concept.target, ())
        ]
        self._numbers: list[list[int]] = [[] for _ in concepts]
        for number, (owner, _) in enumerate(self._words):
            self._numbers[owner].append(number)
        self._memo: AnchorMemo = {}

    def __len__(self) -> int:
        return len(self._words)

    def __getitem__(self, number: Any) -> Any:
        concept, word = self.concept(number), self._words[number][1]
        guidance = self._config.negative_guidance if number < self.named else 0.0
        if len(self._memo) > _ANCHORS:
            self._memo.clear()
        return align(
            self._text,
            word,
            concept.destination,
            self._config.of(concept.kind),
            context=self._context,
            neutral=self._neutral,
            negative_guidance=guidance,
            memo=self._memo,
        )

    def concept(self, number: int) -> Concept:
        """Whose word an item is of."""
        return self.concepts[self._words[number][0]]

    def numbers(self, concept: int) -> list[int]:
        """Items of the concept of that place, named words first; they share an anchor."""
        return self._numbers[concept]


def _spread(words: Sequence[str], count: int) -> tuple[str, ...]:
    """`count` of the words, evenly over the list."""
    return tuple(words[:: max(1, len(words) // max(1, count))][:count])
