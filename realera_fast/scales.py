"""What rows of the closed form weigh, and how far names go: chosen by what each choice does."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from realera_fast.config import EraseConfig
from realera_fast.mining import NOISE, KnownWords, WordSpace
from realera_fast.runtime import folded
from realera_fast.selection import Selection
from realera_fast.solver import ClosedFormConfig, NormalEquations
from realera_fast.text import Concept

if TYPE_CHECKING:
    from realera_fast.equations import Equations

logger = logging.getLogger(__name__)

PRESERVE = (640.0, 320.0, 160.0, 80.0, 40.0, 20.0, 10.0, 5.0, 2.0, 1.0, 0.5)
GUIDANCE = (0.0, 0.25, 0.5, 0.75, 1.0)
"""What is compared; of equals the first, which moves less, is taken (ours)."""
NEIGHBORS = (1.0, 0.3, 0.1)
"""Weights of a mined word that are compared where several concepts go: there the words of one stand
in the way of the names of others (ours; of one concept nothing is gained)."""
_FIXED = 40.0
"""Where nothing can be chosen (ours)."""
_FEWEST = 64
"""Fewer things beside the prior's say too little (count; ours)."""
_MINED = 256
"""Words that follow and that are looked at (count; ours)."""
_THINGS = 256
"""Words that should stay and that are looked at (count; ours)."""
EDGE = 0.6
"""A word that stays is there while it moved less of its length, one that goes is gone when less of
its way is left (ours: where pictures of 16 tuning things of the embedded model change)."""
_SOFT = 0.05
"""Width of that edge (ours)."""


@dataclass(frozen=True)
class Scales:
    """Three numbers of the closed form, and why they are so."""

    preserve: float
    """Weight of the prior's mean row, and of each preserved word (`preserve_scale`)."""
    guidance: float
    """How far past the anchor named words go (`negative_guidance`)."""
    neighbors: float = 1.0
    """Weight of each mined word (`neighbor_scale`)."""
    width: int | None = None
    """Features of the text on which `preserve` was chosen; None where the user gave it."""
    curve: tuple[dict[str, float], ...] = ()
    """What each choice does; empty where the user chose."""

    @property
    def worth(self) -> float:
        """Of the best choice, 0 to 1; 1 where nothing was compared."""
        return max((point["worth"] for point in self.curve), default=1.0)

    def preserve_of(self, width: int) -> float:
        """The preserve scale for text of another width: at scale s a typical word goes q / (1 + q)
        of its way, with q = width / s (docs/method.md, section 5)."""
        return self.preserve if self.width is None else self.preserve * width / self.width

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "preserve_scale": self.preserve,
            "negative_guidance": self.guidance,
            "neighbor_scale": self.neighbors,
            "curve": [dict(point) for point in self.curve],
        }


@dataclass(frozen=True)
class Looked:
    """Rows by which a choice is judged."""

    named: Tensor
    """`[n, d]` of named words."""
    named_aims: Tensor
    """`[n, d]` of what each becomes."""
    mined: Tensor
    """`[m, d]` of words that follow them."""
    mined_aims: Tensor
    """`[m, d]` of what each becomes."""
    mined_odd: Tensor
    """`[m]` bool, whether each is of the second half (`Equations.halves`)."""
    relatives: Tensor
    """`[r, d]` of other kinds of what goes, which should stay."""
    things: Tensor
    """`[t, d]` of an even sample of things that should stay, where there are enough of such as the
    prior does not hold."""
    mean: Tensor
    """`[d]` float64 of the mean word."""
    stride: int
    """Of so many words that follow one is looked at."""
    mined_least: Tensor
    """`[m]` float64, least weight of each word that follows (`least_weight`)."""


def scales_of(
    config: EraseConfig, equations: Equations, known: KnownWords, selection: Selection
) -> Scales:
    """The scales of an erasure: the user's, or those that do best."""
    preserve, guidance = config.vocabulary.preserve_scale, config.pairs.negative_guidance
    noisy, neighbors = config.mining.mode in NOISE, config.mining.neighbor_scale
    if guidance == "auto" and noisy:
        guidance = 0.0
    if neighbors == "auto" and (noisy or len(selection.concepts) == 1):
        neighbors = 1.0
    if not (isinstance(preserve, str) or isinstance(guidance, str) or isinstance(neighbors, str)):
        return Scales(preserve, guidance, neighbors)
    if not config.closed_form.enabled:
        return Scales(_FIXED, 0.0)
    # Rows that noise is mined around are sent past the anchor before they are summed.
    summed = guidance if noisy and not isinstance(guidance, str) else None
    amounts = GUIDANCE if isinstance(guidance, str) else (guidance,)
    if summed is not None:
        amounts = (0.0,)
    found = choose_scales(
        equations,
        known.space,
        looked_at(known, selection),
        preserve=PRESERVE if isinstance(preserve, str) else (preserve,),
        guidance=amounts,
        neighbors=NEIGHBORS if isinstance(neighbors, str) else (neighbors,),
        options=config.closed_form,
    )
    return found if summed is None else dataclasses.replace(found, guidance=summed)


def least_weight(concept: Concept) -> float:
    """Least weight of a word that follows a concept, where value projections speak: a category is
    its members, and its name is far from them (ours: of four categories of the embedded model
    fewest words come through at 1)."""
    return 1.0 if concept.kind == "explicit" else 0.0


def looked_at(known: KnownWords, selection: Selection) -> Looked:
    """What the choice looks at: words that go, relatives, and an even sample of things."""
    named: list[tuple[str, Concept]] = []
    mined: list[tuple[str, Concept]] = []
    for concept in selection.concepts:
        named += [(word, concept) for word in concept.words]
        mined += [(word, concept) for word in selection.mined[concept.target]]
    stride = max(1, math.ceil(len(mined) / _MINED))
    numbers = range(len(mined))[::stride]
    mined = [mined[number] for number in numbers]
    gone = {folded(word) for word in selection.leaving}
    things = [word for word in known.read.things if folded(word) not in gone]
    rows_of_their_own = {folded(word) for word in (*selection.vocabulary.words, *selection.held)}
    # A small vocabulary is all in the prior.
    apart = [word for word in things if folded(word) not in rows_of_their_own]
    things = apart if len(apart) >= _FEWEST else things
    # Those that tell the line were read before.
    read = [word for word in things if word in known.numbers]
    things = read if len(read) >= _FEWEST else things
    things = things[:: max(1, math.ceil(len(things) / _THINGS))]

    def aims(pairs: Sequence[tuple[str, Concept]]) -> Tensor:
        found = {c.target: selection.anchor_row(known, c) for c in selection.concepts}
        rows = [found[concept.target] for _, concept in pairs]
        return torch.stack(rows) if rows else known.rows_of([])

    return Looked(
        known.rows_of([word for word, _ in named]),
        aims(named),
        known.rows_of([word for word, _ in mined]),
        aims(mined),
        torch.tensor([number % 2 == 1 for number in numbers], dtype=torch.bool, device="cpu"),
        known.rows_of(selection.relatives),
        known.rows_of(things),
        known.space.mean,
        stride,
        torch.tensor([least_weight(c) for _, c in mined], dtype=torch.float64, device="cpu"),
    )


def choose_scales(
    equations: Equations,
    space: WordSpace,
    looked: Looked,
    *,
    preserve: Sequence[float],
    guidance: Sequence[float],
    neighbors: Sequence[float] = (1.0,),
    options: ClosedFormConfig,
) -> Scales:
    """The preserve scale s, the guidance g and the weight m of mined words at which words go and
    others stay best.

    With A(s, m) = s P + Q_named + m Q_mined and D(g, m) = (1 + g) D_named + m D_mined every choice
    is a small solve for the rows that are looked at. A word that goes is gone when less than
    `EDGE` of its way to the anchor is left, one that stays has stayed when it moved less than that
    of the way to the mean word, both in the metric of what attention writes (`WordSpace`), with a
    soft edge. Mined words are judged by what the names and the other half of them do, as words are
    that nobody lists. The best choice has the largest harmonic mean of named words gone, mined
    words gone, relatives kept and things kept.
    """
    width = len(equations.prior) if len(preserve) > 1 else None
    if not len(looked.things):
        logger.warning("%s", _NOTHING_STAYS)
        return Scales(_FIXED if len(preserve) > 1 else preserve[0], guidance[0], neighbors[0])
    named = _Moments.of(equations.named)
    halves = tuple(_Moments.of(half) for half in equations.halves)
    mined = _Moments.of(equations.halves[0] + equations.halves[1])
    staying = equations.staying.scaled(1.0).gram
    odd = looked.mined_odd
    # Mined words are judged by the other half of them.
    judged: _Judged = (
        (
            mined,
            {
                "named": (looked.named, looked.named_aims),
                "relatives": (looked.relatives, None),
                "things": (looked.things, None),
            },
        ),
        (halves[0], {"unlisted": (looked.mined[odd], looked.mined_aims[odd])}),
        (halves[1], {"unlisted": (looked.mined[~odd], looked.mined_aims[~odd])}),
    )
    curve = []
    for weight, scale in itertools.product(neighbors, preserve):
        held = scale * staying
        held.diagonal().add_(equations.ridge(options, scale))
        found = [
            _moves(held, (named, part.scaled(weight)), torch.cat([r for r, _ in groups.values()]))
            for part, groups in judged
        ]
        moves = [move for move in found if move is not None]
        if len(moves) < len(judged):
            continue
        for amount in guidance:
            point = _point(space, judged, moves, amount)
            curve.append(
                {
                    "preserve_scale": scale,
                    "negative_guidance": amount,
                    "neighbor_scale": weight,
                }
                | {name: round(value, 4) for name, value in point.items()}
                | {"worth": round(worth(point), 4)}
            )
    if not curve:
        # The solver says what is wrong, and tries more.
        return Scales(preserve[0], guidance[0], neighbors[0], width)
    best = max(curve, key=lambda point: point["worth"])
    logger.info("scales: %s", ", ".join(f"{name} {value:g}" for name, value in best.items()))
    chosen = best["preserve_scale"], best["negative_guidance"], best["neighbor_scale"]
    return Scales(*chosen, width, tuple(curve))


@dataclass(frozen=True)
class _Moments:
    """Sums of rows that move, apart from the accumulator that goes on."""

    gram: Tensor
    cross: Tensor

    @classmethod
    def of(cls, equations: NormalEquations) -> _Moments:
        copy = equations.scaled(1.0)
        return cls(copy.gram, copy.cross)

    def scaled(self, weight: float) -> _Moments:
        return self if weight == 1.0 else _Moments(weight * self.gram, weight * self.cross)


def _moves(held: Tensor, parts: Sequence[_Moments], rows: Tensor) -> list[Tensor] | None:
    """`[n, d]` float64 D_i A^-1 x of `[n, d]` rows x for each of the sums; None where A is
    singular."""
    factor, info = torch.linalg.cholesky_ex(held + sum(part.gram for part in parts))
    if int(info):
        return None
    solved = torch.cholesky_solve(rows.to(factor).mT, factor)
    return [(part.cross @ solved).mT.cpu() for part in parts]


_Judged = Sequence[tuple[_Moments, Mapping[str, tuple[Tensor, Tensor | None]]]]
"""Sums of mined words, and rows that are judged by these and the named words: `[n, d]` by what they
are, with their aims, or None of rows that stay."""


def _point(
    space: WordSpace, judged: _Judged, moves: Sequence[Sequence[Tensor]], guidance: float
) -> dict[str, float]:
    """Mean share of each group of rows that are where they should be."""
    shares: dict[str, list[float]] = {}
    for (_, groups), (named, mined) in zip(judged, moves, strict=True):
        steps = (1.0 + guidance) * named + mined
        parts = steps.split([len(rows) for rows, _ in groups.values()])
        for (name, (rows, aims)), step in zip(groups.items(), parts, strict=True):
            share = _kept(space, rows, step) if aims is None else _gone(space, rows, aims, step)
            shares.setdefault(name, []).extend(share.tolist())
    return {name: sum(part) / len(part) for name, part in shares.items() if part}


def _gone(space: WordSpace, rows: Tensor, aims: Tensor, step: Tensor) -> Tensor:
    """`[n]` how far words are gone, 0 to 1: by what is left of the way to their aims."""
    way = rows.double() - aims.double()
    return gone(space.shares(way + step, way))


def gone(left: Tensor) -> Tensor:
    """How far words are gone, 0 to 1, of whose way to the anchor so much is left."""
    # Who went past the anchor is not more gone than who reached it.
    return torch.sigmoid((EDGE - left.clamp_min(0.0)) / _SOFT)


def _kept(space: WordSpace, rows: Tensor, step: Tensor) -> Tensor:
    """`[n]` how well words are kept, 0 to 1: by how far they moved of the way to the mean word."""
    own = space.sizes(space.seen(rows)).clamp_min(1e-300)
    return stays(space.sizes(step) / own)


def stays(moved: Tensor) -> Tensor:
    """How well words are kept, 0 to 1, that moved so much of the way to the mean word."""
    return torch.sigmoid((EDGE - moved) / _SOFT)


_NOTHING_STAYS = (
    "scales: the tokenizer names no things that should stay, so there is nothing to choose by; set "
    "vocabulary.preserve_scale and pairs.negative_guidance"
)


def worth(point: Mapping[str, float]) -> float:
    """The harmonic mean; 0 if one is 0."""
    return 0.0 if min(point.values()) <= 0 else statistics.harmonic_mean(point.values())
