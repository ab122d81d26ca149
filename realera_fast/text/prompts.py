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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from realera_fast.runtime import folded
from realera_fast.text.concepts import Concept
from realera_fast.text.encoders import Span, Text
from realera_fast.text.free_prompts import FreePrompts
from realera_fast.text.padding import (
    first_row_weights,
    read_rows,
    row_weights,
    shared_paddings,
)
from realera_fast.text.templates import PairsConfig, before_word, fill, prompts_of

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


AnchorMemo: TypeAlias = dict[object, list[_Anchor]]
"""Encoded anchors, kept between words that share one."""


def _paddings(
    filled: Sequence[tuple[str, str]], number: int | None, mined: bool
) -> list[float] | None:
    """What the padding of each `(template, context word)` weighs (`padding.read_rows`).

    Context words of a template share theirs; of a mined word none is read but its first row.

    Args:
        number: of the word; None reads everything.
    """
    if number is None:
        return None
    if mined:
        return [0.0] * len(filled)
    groups: dict[str, list[int]] = {}
    for place, (template, _) in enumerate(filled):
        groups.setdefault(template, []).append(place)
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
    aim = _Aim(anchor, tuple(neutral))
    plan = _plan(text, word, aim, templates, context, number=number, mined=mined)
    return _aligned(text, plan, aim, read_rows(text, plan.prompts, plan.paddings), {})


@dataclass(frozen=True)
class _Aim:
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
class _Plan:
    """What is read of a word."""

    word: str
    prompts: tuple[str, ...]
    filled: tuple[tuple[str, str], ...]
    """Template and context word of each."""
    paddings: Sequence[float] | None
    """What the padding of each weighs, and that of the anchor's prompts (`padding.read_rows`)."""


def _plan(
    text: Text,
    word: str,
    aim: _Aim,
    templates: Sequence[str],
    context: Sequence[str],
    *,
    number: int | None,
    mined: bool,
) -> _Plan:
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
    paddings = _paddings(filled, number, mined)
    return _Plan(word, tuple(prompt for prompt, _, _ in kept), filled, paddings)


def _aligned(
    text: Text, plan: _Plan, aim: _Aim, source: Tensor, memo: AnchorMemo
) -> AlignedPrompts:
    """A word beside its anchor.

    Args:
        source: `[p, t, d]` rows of its prompts.
        memo: keeps encoded anchors, for words that share one.
    """
    filled, paddings = plan.filled, plan.paddings
    key = (aim, filled, None if paddings is None else tuple(paddings))
    if key not in memo:
        memo[key] = _anchors(text, aim.anchor, filled, aim.neutral, paddings)
    anchors = memo[key]
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


_ANCHOR_BYTES = 1 << 30
"""Encoded anchors of so many bytes are kept at a time, and one more."""
_MINED_TEMPLATES = 3
"""Templates in which a mined word is read, others for each word (count; ours): its rows are summed,
and those of one word in many templates tell little more."""
_KEPT_BYTES = 1 << 28
"""Prompts of so many bytes are kept, so that the report need not encode them again."""
_FREE_TOKENS = 3
"""Vectors that an attack has at least, where so many fit into the prompt (count; ours)."""
_TOGETHER = 1 << 23
"""Numbers of embeddings of mined words that are read together: short prompts are slow alone."""


class ConceptPrompts(Sequence[AlignedPrompts]):
    """Prompts of all words of all concepts, encoded when asked for; kept if they take little.

    The named words come first, concept by concept, then the mined neighbor words. Memory is bounded
    however many concepts there are; words of one concept are best asked for one after the other, as
    they share its anchor.
    """

    def __init__(
        self,
        text: Text,
        concepts: Sequence[Concept],
        neighbors: Mapping[str, Sequence[str]],
        config: PairsConfig,
        *,
        avoid: Sequence[str] = (),
        words: Sequence[str] = (),
        anchors: Mapping[str, Sequence[str]] | None = None,
        whole: bool = True,
    ) -> None:
        """
        Args:
            neighbors: mined words by target.
            whole: read all padding, as whoever draws from the prompts must; else as much of it as
                sums of rows need.
            anchors: words whose average concepts become, by target.
            words: what `{word}` templates and the mean word are made of.
            avoid: words that stand neither in `{word}` templates nor in the mean word, such as the
                concepts' own neighbors.
        """
        self._text, self._config, self.concepts = text, config, tuple(concepts)
        left_out = {folded(w) for w in (*avoid, *(w for c in concepts for w in c.words))}
        usable = [w for w in words if folded(w) not in left_out]
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
        self._anchors, self._whole = anchors or {}, whole
        self._kept: dict[int, AlignedPrompts] = {}
        self._bytes = 0
        self._ahead: dict[int, AlignedPrompts] = {}

    def __len__(self) -> int:
        return len(self._words)

    def __getitem__(self, number: Any) -> Any:
        number = range(len(self))[number]
        if number in self._kept:
            return self._kept[number]
        if number not in self._ahead:
            self._ahead = self._read_from(number)
        found = self._ahead.pop(number)
        size = 3 * found.source.numel() * found.source.element_size()
        if self._bytes + size <= _KEPT_BYTES:
            self._kept[number] = found
            self._bytes += size
        return found

    def _read_from(self, number: int) -> dict[int, AlignedPrompts]:
        """A word's prompts and, of mined ones, those of the next few of the same concept."""
        text, concept, aim = self._text, self.concept(number), self._aim(number)
        named = number < self.named
        templates = self._config.of(concept.kind)
        # A mined word stands for itself, and there are many: no context is put beside it.
        plain = tuple(t for t in templates if "{word}" not in t) or templates
        few = max(1, _TOGETHER // (len(plain) * text.max_tokens * text.width))
        # Whoever draws asks for words in any order.
        last = number if named or self._whole else number + few - 1
        numbers = [n for n in self._numbers[self._words[number][0]] if number <= n <= last]
        plans = [
            _plan(
                text,
                self._words[n][1],
                aim,
                templates if named else plain if self._whole else self._in_turns(plain, n, aim),
                self._context,
                number=None if self._whole else n,
                mined=not named,
            )
            for n in numbers
        ]
        prompts = [prompt for plan in plans for prompt in plan.prompts]
        paddings = [p for plan in plans for p in plan.paddings or [1.0] * len(plan.prompts)]
        rows = read_rows(text, prompts, paddings).split([len(plan.prompts) for plan in plans])
        if sum(a.hidden.nbytes for found in self._memo.values() for a in found) > _ANCHOR_BYTES:
            self._memo.clear()
        return {
            n: _aligned(text, plan, aim, source, self._memo)
            for n, plan, source in zip(numbers, plans, rows, strict=True)
        }

    def _aim(self, number: int) -> _Aim:
        concept = self.concept(number)
        chosen = self._anchors.get(concept.target, ())
        only = chosen[0] if len(chosen) == 1 else None
        return _Aim(only if chosen else concept.destination, tuple(chosen) or self._neutral)

    def free(self, number: int, count: int) -> FreePrompts:
        """So many prompts that say a word most plainly, for an attack to begin with.

        Of a short name an attack has more vectors than it has tokens: it stands there repeatedly.
        """
        text, longest = self._text, self._aim(number).longest
        word = self._words[number][1]
        times = -(-_FREE_TOKENS // max(1, len(text.token_ids(word))))
        templates = self._config.of(self.concept(number).kind)
        plain = [t for t in templates if "{word}" not in t] or ["{}"]
        for name in (" ".join([word] * times), word):
            fits = [t for t in plain if not any(text.overflow(fill(t, x)) for x in (name, longest))]
            if fits:
                break
        return FreePrompts.of(text, max(fits or plain, key=len), name, count)

    @torch.no_grad()
    def found(self, number: int, prompts: FreePrompts) -> AlignedPrompts:
        """Free prompts beside the anchor of the word they bring back; each weighs 1."""
        text, count = self._text, len(prompts)
        filled = ((prompts.template, ""),) * count
        plan = _Plan(prompts.word, (prompts.prompt,) * count, filled, None)
        rows = _aligned(text, plan, self._aim(number), text.encode_free(prompts), {})
        return replace(rows, weight=count * rows.weight, found=count)

    def _in_turns(self, templates: tuple[str, ...], number: int, aim: _Aim) -> tuple[str, ...]:
        """Some of the templates that a mined word and its aim fit into."""
        words = (self._words[number][1], aim.longest)
        fits = tuple(
            t for t in templates if not any(self._text.overflow(fill(t, w)) for w in words)
        )
        fits = fits or templates
        turned = fits[number % len(fits) :] + fits[: number % len(fits)]
        return turned[:_MINED_TEMPLATES]

    def concept(self, number: int) -> Concept:
        """Whose word an item is of."""
        return self.concepts[self._words[number][0]]

    def numbers(self, concept: int) -> list[int]:
        """Items of the concept of that place, named words first; they share an anchor."""
        return self._numbers[concept]


class WithFound(Sequence[AlignedPrompts]):
    """Prompts of words, and beside them those that were found for some of the words."""

    def __init__(self, prompts: ConceptPrompts, found: Mapping[int, AlignedPrompts]) -> None:
        """
        Args:
            found: by number of the word.
        """
        self._prompts, self._found = prompts, found
        self.named = prompts.named
        """How many of the words were named."""

    def __len__(self) -> int:
        return len(self._prompts)

    def __getitem__(self, number: Any) -> Any:
        number = range(len(self))[number]
        word = self._prompts[number]
        return word.with_found(self._found[number]) if number in self._found else word


def _spread(words: Sequence[str], count: int) -> tuple[str, ...]:
    """`count` of the words, evenly over the list."""
    return tuple(words[:: max(1, len(words) // max(1, count))][:count])
