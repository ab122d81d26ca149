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
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from realera_fast.text.encoders import Span, Text
from realera_fast.text.padding import (
    first_row_weights,
    read_rows,
    row_weights,
    shared_paddings,
)
from realera_fast.text.templates import before_word, fill, prompts_of

logger = logging.getLogger(__name__)


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
    """`[p, t, d]` float32: for every source row the anchor's row that it is aligned with."""
    anchor: Tensor
    """`[p, t, d]` float32: the anchor prompts as encoded, unaligned: what the teacher is shown."""
    weight: Tensor
    """`[p, t]` float32: 0 for rows that carry no text (begin-of-text, hidden padding); all
    templates weigh the same, however many context words fill them; sums to 1 where all padding
    is read, and else over many words on average."""
    plain: int
    """Number of the prompt that says the word most plainly: the longest without a context word."""
    found: int = 0
    """How many of the prompts, the last ones, were found by attacking the edited model (count).
    What they bring back is what the original model draws for the plain prompt."""

    def first(self, ends: Sequence[int]) -> AlignedPrompts:
        """The same word in the first of its prompts, with one row of padding each and without what
        the teacher is shown.

        Args:
            ends: row of the last token of each of these prompts.
        """
        count, stop = len(ends), min(max(ends) + 2, self.weight.shape[1])

        def part(rows: Tensor) -> Tensor:
            return rows[:count, :stop].clone()

        weight = part(self.weight)
        for row, end in zip(weight, ends, strict=True):
            row[end + 2 :] = 0.0

        return AlignedPrompts(
            self.word,
            self.prompts[:count],
            self.anchor_prompts[:count],
            part(self.source),
            part(self.destination),
            self.anchor[:count, :0].clone(),
            weight,
            0,
        )

    def with_found(self, other: AlignedPrompts) -> AlignedPrompts:
        """The same word in prompts that were found as well."""

        def both(name: str) -> Tensor:
            return torch.cat([getattr(self, name), getattr(other, name)])

        return AlignedPrompts(
            self.word,
            self.prompts + other.prompts,
            self.anchor_prompts + other.anchor_prompts,
            both("source"),
            both("destination"),
            both("anchor"),
            both("weight"),
            self.plain,
            self.found + len(other.prompts),
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


AnchorMemo: TypeAlias = dict[object, dict[tuple[str, str], _Anchor]]
"""Encoded anchors by what is read together, then by template and context word, kept between words
that share one."""


def _paddings(
    filled: Sequence[tuple[str, str]], number: int | None, mined: bool, pooled: bool
) -> list[float] | None:
    """What the padding of each `(template, context word)` weighs (`padding.read_rows`).

    Context words of a template share theirs; of a mined word none is read but its first row.

    Args:
        number: of the word; None reads everything.
        pooled: whether templates share theirs too, as there are many words.
    """
    if number is None:
        return None
    if mined:
        return [0.0] * len(filled)
    groups: dict[str, list[int]] = {}
    for place, (template, extra) in enumerate(filled):
        groups.setdefault("" if pooled and not extra else template, []).append(place)
    found = [0.0] * len(filled)
    for places in groups.values():
        shared = shared_paddings(len(places), number)
        for place, padding in zip(places, shared, strict=True):
            found[place] = padding
    return found


def _anchors(
    text: Text,
    anchor: str | None,
    filled: Sequence[tuple[str, str]],
    neutral: Sequence[str],
    paddings: Sequence[float] | None,
) -> list[_Anchor]:
    """The anchor in each `(template, context word)`; `None` is the mean over `neutral` words."""
    # A tokenizer that offers no words leaves the prompt without the concept as the neutral one.
    words = [anchor or ""] if anchor is not None or not neutral else list(neutral)
    if len(words) > 1:
        # Rows of words of one length stand at the same places.
        lengths = [len(text.token_ids(word)) for word in words]
        words = [w for w, n in zip(words, lengths, strict=True) if n == min(lengths)]
    prompts = [fill(template, word, extra) for template, extra in filled for word in words]
    whole: dict[str, float] = dict.fromkeys(prompts, 0.0)
    if paddings is not None:
        for number, prompt in enumerate(prompts):
            whole[prompt] = max(whole[prompt], paddings[number // len(words)])
    distinct = list(whole)
    read = read_rows(text, distinct, None if paddings is None else list(whole.values()))
    rows = dict(zip(distinct, read, strict=True))
    ends = dict(zip(distinct, text.ends(distinct), strict=True))
    found = []
    for number, (template, extra) in enumerate(filled):
        part = prompts[number * len(words) : (number + 1) * len(words)]
        label = part[0] if len(words) == 1 else fill(template, "<mean word>", extra)
        hidden = torch.stack([rows[prompt] for prompt in part]).mean(dim=0)
        span = text.span(before_word(template, extra), words[0])
        found.append(_Anchor(label, hidden, span, ends[part[0]]))
    return found


def align(
    text: Text,
    word: str,
    anchor: str | None,
    templates: Sequence[str],
    *,
    context: Sequence[str] = (),
    neutral: Sequence[str] = (),
    number: int | None = None,
    mined: bool = False,
) -> AlignedPrompts:
    """Encodes a word and its anchor in every template and aligns their rows.

    Templates in which the prompt is longer than the encoder holds are left out with a log message.

    Args:
        anchor: what the word becomes; `None` is the mean over `neutral`, words of one token each.
        context: words put into `{word}` templates.
        number: of the word, where some of the padding may stand for all of it; None reads all.
        mined: whether it is one of many, of whose padding the first row stands for all.

    Raises:
        ValueError: the word fits in no template; the message says what would be cut.
    """
    aim = Aim(anchor, tuple(neutral))
    plan = plan_of(text, word, aim, templates, context, number=number, mined=mined)
    return aligned(text, plan, aim, read_rows(text, plan.prompts, plan.paddings), {})


@dataclass(frozen=True)
class Aim:
    """What words become."""

    anchor: str | None
    """`None` is the mean over `neutral`."""
    neutral: tuple[str, ...]

    @property
    def longest(self) -> str:
        """What of it takes the most room."""
        neutral = self.anchor is None and self.neutral
        return neutral[0] if neutral else self.anchor or ""


@dataclass(frozen=True)
class Plan:
    """What is read of a word."""

    word: str
    prompts: tuple[str, ...]
    filled: tuple[tuple[str, str], ...]
    """Template and context word of each."""
    paddings: Sequence[float] | None
    """What the padding of each weighs, and that of the anchor's prompts (`padding.read_rows`)."""
    together: tuple[tuple[str, str], ...] = ()
    """In which the anchor is read at once, without padding, if not in these alone."""


def plan_of(
    text: Text,
    word: str,
    aim: Aim,
    templates: Sequence[str],
    context: Sequence[str],
    *,
    number: int | None,
    mined: bool,
    pooled: bool = False,
) -> Plan:
    """Prompts of a word that fit; as `align`."""
    kept = []
    cut = ""
    for prompt, template, extra in prompts_of(word, templates, context):
        over = text.overflow(prompt) or text.overflow(fill(template, aim.longest, extra))
        if over:
            cut = over
            logger.info("template %r is too long for %r: %r would be cut", template, word, over)
        else:
            kept.append((prompt, template, extra))
    if not kept:
        raise ValueError(
            f"concept {word!r} (anchor {aim.anchor!r}) needs more tokens than the text encoder "
            "holds (special tokens included) in every template; "
            f"{cut!r} would be cut: use fewer words"
        )
    filled = tuple((template, extra) for _, template, extra in kept)
    paddings = _paddings(filled, number, mined, pooled)
    return Plan(word, tuple(prompt for prompt, _, _ in kept), filled, paddings)


def aligned(text: Text, plan: Plan, aim: Aim, source: Tensor, memo: AnchorMemo) -> AlignedPrompts:
    """A word beside its anchor.

    Args:
        source: `[p, t, d]` rows of its prompts.
        memo: keeps encoded anchors, for words that share one.
    """
    filled, paddings = plan.filled, plan.paddings
    together = plan.together or filled
    read = paddings if together is filled else [0.0] * len(together)
    # What is read with an anchor decides its last digits: no earlier word may.
    key = (aim, together, None if read is None else tuple(read))
    if key not in memo:
        found_there = _anchors(text, aim.anchor, together, aim.neutral, read)
        memo[key] = dict(zip(together, found_there, strict=True))
    anchors = [memo[key][at] for at in filled]
    index = []
    ends = text.ends(plan.prompts)
    for (template, extra), end, found in zip(filled, ends, anchors, strict=True):
        span = text.span(before_word(template, extra), plan.word)
        index.append(_rows(span, end, found.span, found.end, text.max_tokens))
    hidden = torch.stack([found.hidden for found in anchors])
    place = torch.tensor(index, device=hidden.device)
    destination = torch.gather(hidden, 1, place[..., None].expand_as(hidden))
    times = Counter(template for template, _ in filled)
    share = torch.tensor(
        [1.0 / (len(times) * times[t]) for t, _ in filled], dtype=torch.float64, device="cpu"
    )
    if paddings is not None and not any(paddings):
        rows = first_row_weights(text, plan.prompts)
    else:
        rows = row_weights(text, plan.prompts, paddings)
    weight = share[:, None] * rows
    plain = max(
        range(len(filled)), key=lambda i: ("{word}" not in filled[i][0], len(plan.prompts[i]))
    )
    return AlignedPrompts(
        plan.word,
        plan.prompts,
        tuple(found.prompt for found in anchors),
        source,
        destination,
        hidden,
        weight.to(source.device, torch.float32),
        plain,
    )
