"""Prompts that begin alike, read together: a causal encoder computes what they share once.

    <bos> a photo of a  cat <eos> <pad>  kitten <eos> <pad>  dog <eos> <pad>

Tokens form a tree: each stands at its depth and sees what leads to it alone, which is all that it
would see in a prompt of its own. A mined word in a template takes three tokens in place of eight.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

States: TypeAlias = Callable[..., Tensor]
"""`[b, n, d]` of `[b, n]` tokens, a mask, and `positions`."""


@dataclass
class Pack:
    """Some prompts as one tree of tokens; nothing stands before what leads to it."""

    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    """Place of the token before; of a first one its own."""
    depths: list[int] = field(default_factory=list)
    paths: dict[int, list[int]] = field(default_factory=dict)
    """By number of the prompt: the places of its tokens."""

    def add(self, number: int, tokens: Sequence[int], shared: Sequence[int]) -> None:
        """Adds a prompt whose first tokens are at the places `shared`."""
        path = list(shared)
        for depth in range(len(path), len(tokens)):
            place = len(self.tokens)
            self.tokens.append(tokens[depth])
            self.parents.append(path[-1] if path else place)
            self.depths.append(depth)
            path.append(place)
        self.paths[number] = path


def packs_of(prompts: Sequence[Sequence[int]], longest: int) -> list[Pack]:
    """All prompts in packs of up to so many tokens, those that begin alike in one.

    Args:
        prompts: tokens of each, as many as are to be read, `longest` at most.
    """
    packs: list[Pack] = []
    before: Sequence[int] = ()
    last = 0
    for number in sorted(range(len(prompts)), key=lambda i: tuple(prompts[i])):
        tokens = prompts[number]
        alike = _alike(tokens, before)
        if not packs or len(packs[-1].tokens) + len(tokens) - alike > longest:
            packs.append(Pack())
            alike = 0
        shared = packs[-1].paths[last][:alike] if alike else ()
        packs[-1].add(number, tokens, shared)
        before, last = tokens, number
    return packs


def _alike(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two prompts begin with alike."""
    differs = (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(differs, min(len(one), len(other)))


def forked(prompts: Sequence[Sequence[int]], longest: int) -> list[Sequence[int]]:
    """Some prompts that stand in one pack and go different ways in it; none if there are none."""
    for pack in packs_of(prompts[:_LOOKED_AT], longest):
        distinct = list(dict.fromkeys(tuple(prompts[number]) for number in pack.paths))
        few = distinct[:_COMPARED]
        if len(few) > 1 and 0 < _alike(few[0], few[1]) < min(len(few[0]), len(few[1])):
            return list(few)
    return []


@dataclass(frozen=True)
class Batch:
    """Packs as an encoder is shown them."""

    packs: Sequence[Pack]
    ids: Tensor
    """`[b, n]` int64 tokens."""
    positions: Tensor
    """`[b, n]` int64 where each stands in its prompt."""
    mask: Tensor
    """`[b, 1, n, n]` what is added to attention's scores: 0 for what a token sees."""


def batches_of(packs: Sequence[Pack], together: int, like: Tensor) -> Iterator[Batch]:
    """Packs in batches of up to so many, those of one length beside each other.

    Args:
        like: decides device and dtype.
    """
    ordered = sorted(packs, key=lambda pack: -len(pack.tokens))
    for start in range(0, len(ordered), together):
        few = ordered[start : start + together]
        count, most = len(few), len(few[0].tokens)

        def filled(name: str, few: Sequence[Pack] = few, most: int = most) -> Tensor:
            rows = [getattr(pack, name) for pack in few]
            return torch.tensor(
                [row + [0] * (most - len(row)) for row in rows], dtype=torch.long, device="cpu"
            )

        parents = filled("parents")
        sees = torch.eye(most, dtype=torch.bool, device="cpu").repeat(count, 1, 1)
        every = torch.arange(count, device="cpu")
        for place in range(most):
            sees[:, place] |= sees[every, parents[:, place]]
        mask = torch.zeros(count, 1, most, most, dtype=like.dtype, device="cpu")
        mask.masked_fill_(~sees[:, None], torch.finfo(like.dtype).min)
        ids, positions = (filled(name).to(like.device) for name in ("tokens", "depths"))
        yield Batch(few, ids, positions, mask.to(like.device))


class PackedReader:
    """Reads prompts of a causal encoder, in packs where the encoder takes them.

    The first packs are compared with what the encoder makes of the same prompts alone: older
    releases of transformers and some kinds of attention take no mask of their own.
    """

    def __init__(self, *, longest: int, numbers: int, packs: bool = True) -> None:
        """
        Args:
            longest: tokens of a prompt at most.
            numbers: embeddings, in numbers, that are computed together.
            packs: whether the encoder may take packs.
        """
        self._longest, self._numbers = longest, numbers
        self._packs: bool | None = None if packs else False
        """Whether it does; None before the first."""

    def rows(
        self, prompts: Sequence[Sequence[int]], states: States, like: Tensor
    ) -> Iterator[tuple[int, Tensor]]:
        """The number of each prompt and its `[n, d]` rows, in any order.

        Args:
            prompts: tokens of each.
            states: what the encoder makes of them; not kept, as it holds the encoder.
            like: `[v, d]` embeddings of tokens, which decide device and dtype.
        """
        if self._packs is None and (few := forked(prompts, self._longest)):
            self._packs = self._agree(few, states, like)
        # One alone has nobody to share with.
        read = self._packed if self._packs and len(prompts) > 1 else self._apart
        yield from read(prompts, states, like)

    def _apart(
        self, prompts: Sequence[Sequence[int]], states: States, like: Tensor
    ) -> Iterator[tuple[int, Tensor]]:
        """Prompts of one length together."""
        of_length: dict[int, list[int]] = {}
        for number, tokens in enumerate(prompts):
            of_length.setdefault(len(tokens), []).append(number)
        for length, numbers in of_length.items():
            together = self._together(length, like)
            for start in range(0, len(numbers), together):
                part = numbers[start : start + together]
                given = torch.tensor([list(prompts[n]) for n in part], device=like.device)
                yield from zip(part, states(given, torch.ones_like(given)), strict=True)

    def _packed(
        self, prompts: Sequence[Sequence[int]], states: States, like: Tensor
    ) -> Iterator[tuple[int, Tensor]]:
        """Prompts that begin alike together."""
        packs = packs_of(prompts, self._longest)
        for batch in batches_of(packs, self._together(self._longest, like), like):
            found = states(batch.ids, batch.mask, positions=batch.positions)
            for pack, rows in zip(batch.packs, found, strict=True):
                for number, path in pack.paths.items():
                    yield number, rows[torch.tensor(path, device=rows.device, dtype=torch.long)]

    def _together(self, length: int, like: Tensor) -> int:
        return max(1, min(1024, self._numbers // (length * like.shape[-1])))

    def _agree(self, prompts: Sequence[Sequence[int]], states: States, like: Tensor) -> bool:
        """Whether packs give the rows of prompts alone."""
        alone = dict(self._apart(prompts, states, like))
        try:
            packed = dict(self._packed(prompts, states, like))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever an encoder makes of a mask it does not take
            logger.info("prompts are read one by one: %s: %s", type(error).__name__, error)
            return False
        # Rounding stays far below, a token that sees what it should not far above. What all prompts
        # begin with says nothing.
        limit = torch.finfo(like.dtype).eps ** 0.5
        shared = _alike(min(prompts, key=tuple), max(prompts, key=tuple))
        apart = max(
            float(
                ((packed[n] - rows).norm(dim=-1) / rows.norm(dim=-1).clamp_min(1e-12))[
                    shared:
                ].max()
            )
            for n, rows in alone.items()
            if len(rows) > shared
        )
        if not apart <= limit:
            logger.info("prompts are read one by one: packs differ by %.1e", apart)
            return False
        return True


_COMPARED = 4
"""Prompts that are read both ways (count; ours)."""
_LOOKED_AT = 64
"""Prompts among which these are looked for (count; ours)."""
