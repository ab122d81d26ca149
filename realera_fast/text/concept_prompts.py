"""Prompts of all words of all concepts, encoded when they are asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from realera_fast.runtime import folded
from realera_fast.text.concepts import Concept
from realera_fast.text.encoders import Text
from realera_fast.text.free_prompts import FreePrompts
from realera_fast.text.padding import read_rows
from realera_fast.text.prompts import Aim, AlignedPrompts, AnchorMemo, Plan, aligned, plan_of
from realera_fast.text.templates import PairsConfig, fill

_ANCHOR_BYTES = 1 << 30
"""Encoded anchors of so many bytes are kept at a time, and one more."""
_MINED_TEMPLATES = 3
"""Templates in which a mined word is read, others for each word (count; ours): its rows are summed,
and those of one word in many templates tell little more."""
_MANY = 8
"""Named words from which on templates share their padding, another one's for each word (count;
ours)."""
_MEASURED_PROMPTS = 3
"""Prompts in which the report measures a named word, a mined one in the first (count; ours)."""
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
        self._briefs: dict[int, AlignedPrompts] = {}
        self._bytes = 0
        self._ahead: dict[int, AlignedPrompts] = {}
        self._most = 0

    def __len__(self) -> int:
        return len(self._words)

    def __getitem__(self, number: Any) -> Any:
        number = range(len(self))[number]
        if number in self._kept:
            return self._kept[number]
        found = self._next(number, _MINED_TEMPLATES)
        if self._whole:
            self._keep(self._kept, number, found)
        else:
            if number not in self._briefs:
                self._keep(self._briefs, number, self._first(number, found))
        return found

    def brief(self, number: int) -> AlignedPrompts:
        """A word as it is measured: where padding need not be read, in its first prompts alone."""
        if self._whole:
            found: AlignedPrompts = self[number]
            return found
        if number not in self._briefs:
            return self._first(number, self._next(number, 1))
        return self._briefs[number]

    def _first(self, number: int, found: AlignedPrompts) -> AlignedPrompts:
        count = _MEASURED_PROMPTS if number < self.named else 1
        return found.first(self._text.ends(found.prompts[:count]))

    def _keep(self, into: dict[int, AlignedPrompts], number: int, found: AlignedPrompts) -> None:
        """Keeps a word's prompts if there is room."""
        size = sum(part.nbytes for part in (found.source, found.destination, found.anchor))
        if self._bytes + size <= _KEPT_BYTES:
            into[number] = found
            self._bytes += size

    def _next(self, number: int, most: int) -> AlignedPrompts:
        """A word's prompts, and those of the next few are read with it."""
        if self._most != most or number not in self._ahead:
            self._ahead, self._most = self._read_from(number, most), most
        return self._ahead.pop(number)

    def _read_from(self, number: int, most: int) -> dict[int, AlignedPrompts]:
        """A word's prompts and, of mined ones, those of the next few of the same concept.

        Args:
            most: templates of a mined word, where padding need not be read.
        """
        text, concept, aim = self._text, self.concept(number), self._aim(number)
        named = number < self.named
        templates = self._config.of(concept.kind)
        # A mined word stands for itself, and there are many: no context is put beside it.
        plain = tuple(t for t in templates if "{word}" not in t) or templates
        count = len(plain) if self._whole else min(most, len(plain))
        few = max(1, _TOGETHER // (count * text.max_tokens * text.width))
        # Whoever draws asks for words in any order.
        last = number if named or self._whole else number + few - 1
        numbers = [n for n in self._numbers[self._words[number][0]] if number <= n <= last]
        plans = [self._plan(n, aim, templates if named else plain, most) for n in numbers]
        prompts = [prompt for plan in plans for prompt in plan.prompts]
        paddings = [p for plan in plans for p in plan.paddings or [1.0] * len(plan.prompts)]
        rows = read_rows(text, prompts, paddings).split([len(plan.prompts) for plan in plans])
        if (
            sum(a.hidden.nbytes for read in self._memo.values() for a in read.values())
            > _ANCHOR_BYTES
        ):
            self._memo.clear()
        return {
            n: aligned(text, plan, aim, source, self._memo)
            for n, plan, source in zip(numbers, plans, rows, strict=True)
        }

    def _aim(self, number: int) -> Aim:
        concept = self.concept(number)
        chosen = self._anchors.get(concept.target, ())
        only = chosen[0] if len(chosen) == 1 else None
        return Aim(only if chosen else concept.destination, tuple(chosen) or self._neutral)

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
        plan = Plan(prompts.word, (prompts.prompt,) * count, filled, None)
        rows = aligned(text, plan, self._aim(number), text.encode_free(prompts), {})
        return replace(rows, weight=count * rows.weight, found=count)

    def _plan(self, number: int, aim: Aim, templates: tuple[str, ...], most: int) -> Plan:
        """Prompts of a word; of a mined one, where padding need not be read, in some of the
        templates that it and its aim fit into, in turns."""
        word, mined = self._words[number][1], number >= self.named
        fits: tuple[str, ...] = ()
        if mined and not self._whole:
            fits = tuple(
                t
                for t in templates
                if not any(self._text.overflow(fill(t, w)) for w in (word, aim.longest))
            )
            turned = fits[number % len(fits) :] + fits[: number % len(fits)] if fits else templates
            templates = turned[:most]
        plan = plan_of(
            self._text,
            word,
            aim,
            templates,
            self._context,
            number=None if self._whole else number,
            mined=mined,
            pooled=self.named >= _MANY,
        )
        return replace(plan, together=tuple((template, "") for template in fits))

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
