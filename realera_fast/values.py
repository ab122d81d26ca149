"""The closed form where value projections speak: whether it is taken, how far, its factors."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from realera_fast.equations import Equations
from realera_fast.erasure import originals_of
from realera_fast.inputs import VALUES, Job, has_values
from realera_fast.mining import KnownWords
from realera_fast.models import LoraFactors, dense_weight, output_maps
from realera_fast.runtime import full_precision
from realera_fast.scales import (
    Looked,
    Scales,
    gone,
    least_weight,
    looked_at,
    stays,
    worth,
)
from realera_fast.selection import Selection
from realera_fast.solver import NAMED_WEIGHT, ValueSystem

logger = logging.getLogger(__name__)

RIDGES = (1.0, 0.1, 0.01, 0.001)
"""What is compared (ours): few words have room for a great one, which reaches what nobody lists."""
NEIGHBORS = (1.0, 0.3, 0.1, 0.03, 0.0)
"""What is compared (ours)."""
GUIDANCE = (0.0, 0.25)
"""What is compared (ours: with 0.5 as many words go, and less of a scene stays)."""
_CATEGORY = 1.0
"""Guidance of categories alone, where none was asked for (ours: of four categories of the embedded
model fewer words come through than with less, and than after the closed form of the text)."""
_SHARES = (1.0, 0.5, 0.25, 0.0)
"""Of the guidance that was asked for, what is tried (ours)."""
_ENOUGH = 0.85
"""Share of things that should stay, and do, with which a guidance that was asked for is taken
(ours: one tuning thing of the embedded model leaves 0.89 and more with all of 1, five 0.90 with a
quarter, ten 0.74 without any)."""
_MARGIN = 0.02
"""By so much the text has to do better to be taken (ours: of one and five things pictures judge the
values better where the measure is so near)."""
_LAYERS = 8
"""Layers by which is chosen, an even sample (count; ours)."""
_TOO_FEW = 0.5
"""Fewer than that: what is left is not the user's model (ours: pictures of thirty concepts, which
leave less than 1 %, show one other thing in three)."""


@dataclass(frozen=True)
class MovedValues:
    """Updates of value projections, and how they were chosen."""

    factors: Mapping[str, LoraFactors]
    """By layer name, of at most one rank for each word that moves."""
    ridge: float
    """`ClosedFormConfig.value_ridge`, or what was chosen."""
    guidance: float
    """How far past the anchor named words go (`ClosedFormConfig.value_guidance`)."""
    neighbors: float
    """Weight of each mined word (`ClosedFormConfig.value_neighbors`)."""
    curve: tuple[dict[str, float], ...]
    """What each choice does."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, without the factors."""
        return {
            "value_ridge": self.ridge,
            "value_guidance": self.guidance,
            "value_neighbors": self.neighbors,
            "curve": [dict(point) for point in self.curve],
        }


def joined(
    one: Mapping[str, LoraFactors], other: Mapping[str, LoraFactors]
) -> dict[str, LoraFactors]:
    """Additions to weights that do both."""
    both = {name: part + other[name] for name, part in one.items() if name in other}
    return {**one, **other, **both}


def may_move_values(job: Job) -> bool:
    """Whether the closed form may be solved for the outputs of value projections.

    A category goes further past its anchor than a thing: with things beside it the text takes both.
    """
    options = job.config.closed_form
    if options.space != "auto" or job.config.asks_for_text:
        return options.enabled and options.space == "values"
    alike = len({concept.kind == "explicit" for concept in job.concepts}) == 1
    return options.enabled and alike and has_values(job.layers, job.texts)


def moved_values(
    job: Job, selection: Selection, known: KnownWords, equations: Equations, scales: Scales
) -> MovedValues | None:
    """Moves the outputs of words to those of their anchors, and of named words past them.

    The outputs c of a named word become a + g (a / 2 - c) with those of its anchor a, those of a
    mined word a; a is what the mean word's are where nothing else is chosen. What stays is the
    prior, words that were named to stay and words at risk. What is not given is chosen as the
    scales of the text are, by the same measure of words that go and that stay.

    Args:
        known: reads words of the token sequence.
        equations: of the token sequence.
        scales: those of the text, with what they do.

    Returns:
        None where the text does better, if that is left open.

    Raises:
        ValueError: so many words go together that what should stay goes with them.
    """
    config = job.config
    options = config.closed_form
    neighbors = options.value_neighbors
    looked = looked_at(known, selection)
    layers = {name: layer for name, layer in job.layers.items() if name.endswith(VALUES)}
    room = min(layer.out_features for layer in layers.values())
    if len(looked.named) > room / 2 and options.space == "auto":
        return None
    trials = _Trials(job.model, layers, equations.staying.scaled(1.0).gram, looked)
    asked = options.value_guidance
    categories = all(concept.kind == "explicit" for concept in job.concepts)
    if isinstance(asked, str) and categories:
        asked = _CATEGORY
    guidance = GUIDANCE if isinstance(asked, str) else tuple(asked * s for s in _SHARES)
    curve = trials.curve(
        RIDGES if isinstance(options.value_ridge, str) else (options.value_ridge,),
        NEIGHBORS if isinstance(neighbors, str) else (neighbors,),
        tuple(dict.fromkeys(guidance)),
    )
    best = max(curve, key=lambda point: point["worth"])
    if not isinstance(asked, str):
        # The furthest of what leaves enough in place.
        enough = [point for point in curve if _staying(point) >= _ENOUGH]
        last = enough or [p for p in curve if p["value_guidance"] == min(guidance)]
        furthest = max(point["value_guidance"] for point in last)
        best = max(
            (point for point in last if point["value_guidance"] == furthest),
            key=lambda point: point["worth"],
        )
    logger.info("values: %s", ", ".join(f"{name} {value:g}" for name, value in best.items()))
    if options.space == "auto":
        judged = bool(scales.curve) and len(looked.things)
        behind = best["worth"] < scales.worth - _MARGIN and not categories
        if not judged or behind or _staying(best) < _TOO_FEW:
            return None
    if _staying(best) < _TOO_FEW and len(looked.named) > 1:
        raise ValueError(
            f'config: closed_form.space="values" would move {1 - _staying(best):.0%} of the things '
            f"that should stay, as {len(looked.named)} words go together; erase fewer at once, or "
            'set closed_form.space="text"'
        )
    chosen = best["value_ridge"], best["value_guidance"], best["value_neighbors"]
    factors = _factors(selection, known, trials, *chosen, options.rank_tolerance)
    return MovedValues(factors, *chosen, curve)


def _staying(point: Mapping[str, float]) -> float:
    """Share of things that should stay and do; all where there are none."""
    return point.get("things", 1.0)


def _factors(
    selection: Selection,
    known: KnownWords,
    trials: _Trials,
    ridge: float,
    guidance: float,
    neighbors: float,
    rank_tolerance: float,
) -> dict[str, LoraFactors]:
    """Of all words, not only of those that were looked at."""
    named, mined = [], []
    for concept in selection.concepts:
        named += [(word, concept) for word in concept.words]
        if max(neighbors, least_weight(concept)):
            mined += [(word, concept) for word in selection.mined[concept.target]]
    aims = {c.target: selection.anchor_row(known, c) for c in selection.concepts}
    rows = known.rows_of([word for word, _ in (*named, *mined)])
    goals = torch.stack([aims[concept.target] for _, concept in (*named, *mined)])
    count = len(named)
    goals[:count] = (1.0 + guidance / 2) * goals[:count] - guidance * rows[:count]
    given = [NAMED_WEIGHT] * count + [max(neighbors, least_weight(c)) for _, c in mined]
    weights = torch.tensor(given, dtype=torch.float64, device=rows.device)
    found = {}
    for name, layer in trials.layers.items():
        weight = dense_weight(layer)[:, : rows.shape[1]].to(rows.device)
        system = ValueSystem(weight, trials.moment, rows)
        moves = system.held_by(ridge)
        up, down = moves.factors(goals, weights, rank_tolerance=rank_tolerance)
        found[name] = LoraFactors(down, up)
    return found


class _Trials:
    """What choices of ridge, weight and guidance do to the words that are looked at."""

    def __init__(
        self, model: Any, layers: Mapping[str, nn.Linear], moment: Tensor, looked: Looked
    ) -> None:
        """
        Args:
            layers: value projections, by name.
            moment: `[d, d]` of what stays.
        """
        self.layers, self.moment, self.looked = layers, moment, looked
        self._originals = originals_of(model)
        self._outward = output_maps(model, layers, self._originals)

    def curve(
        self, ridges: Sequence[float], neighbors: Sequence[float], guidance: Sequence[float]
    ) -> tuple[dict[str, float], ...]:
        """All choices, and the mean shares of words that are where they should be."""
        choices = list(itertools.product(ridges, neighbors))
        sums = {choice: _Shares(self.looked) for choice in choices}
        names = list(self.layers)
        for name in names[:: -(-len(names) // _LAYERS)]:
            self._add(name, sums)
        return tuple(
            {"value_ridge": ridge, "value_guidance": amount, "value_neighbors": m}
            | {group: round(share, 4) for group, share in point.items()}
            | {"worth": round(worth(point), 4)}
            for ridge, m in choices
            for amount in guidance
            for point in [sums[ridge, m].point(amount)]
        )

    @torch.no_grad()
    @full_precision()
    def _add(self, name: str, sums: Mapping[tuple[float, float], _Shares]) -> None:
        """Adds what a layer says to the sums of each ridge and weight of mined words.

        What was erased before counts as if it were there: that a word is gone is no reason to leave
        it to the text.
        """
        looked = self.looked
        rows = torch.cat([looked.named, looked.mined])
        goals = torch.cat([looked.named_aims, looked.mined_aims])
        staying = torch.cat([looked.relatives, looked.things])
        width, count = rows.shape[1], len(looked.named)
        found = self._originals.get(name)
        weight = dense_weight(self.layers[name]) if found is None else found
        weight = weight[:, :width].to(rows.device)
        system = ValueSystem(weight, self.moment.to(rows.device), rows)
        past = looked.named_aims / 2 - looked.named
        ways = torch.cat([goals - rows, past, staying - looked.mean.to(rows)])
        written = weight.float() @ ways.float().mT
        if name in self._outward:
            written = self._outward[name].to(written) @ written
        own = written[:, len(rows) + count :].square().sum(0).double()
        written = written[:, : len(rows) + count]
        products = (written.mT @ written).double()
        place = torch.arange(len(rows), device=rows.device) - count
        even, odd = ((place >= 0) & (place % 2 == half) for half in (0, 1))
        for ridge in dict.fromkeys(ridge for ridge, _ in sums):
            moves = system.held_by(ridge)
            named = moves.answers(torch.cat([staying, looked.named]))
            mined = moves.answers(looked.mined)
            for (other, m), part in sums.items():
                if other != ridge:
                    continue
                weights = torch.full((len(rows),), NAMED_WEIGHT, dtype=torch.float64)
                weights[count:] = looked.mined_least.clamp_min(m) * looked.stride
                weights = weights.to(rows.device)
                kept, gone_named = moves.moves(named, weights).split([len(staying), count], dim=1)
                goes = torch.cat([gone_named, torch.zeros_like(mined)], dim=1)
                for half in (odd, even):
                    # Mined words are judged by what the names and the other half of them do.
                    others = weights.masked_fill(half, 0.0)
                    goes[:, half] = moves.moves(mined[:, half[count:]], others)
                part.add(own, products, kept, goes)


class _Shares:
    """Sums over layers, of rows that go and of rows that stay, for any guidance."""

    def __init__(self, looked: Looked) -> None:
        self._counts = [len(looked.relatives), len(looked.things)]
        self._named = len(looked.named)
        staying = torch.zeros(sum(self._counts), dtype=torch.float64, device=looked.things.device)
        leaving = staying.new_zeros(self._named + len(looked.mined))
        self._own, self._moved = staying, [staying] * 3
        self._way, self._gone = leaving, [leaving] * 2

    def add(self, own: Tensor, products: Tensor, kept: Tensor, goes: Tensor) -> None:
        """Adds a layer.

        Args:
            own: `[m]` squared lengths of what is written of rows that stay.
            products: `[n + k, n + k]` of what is written of the ways of all n words to their
                anchors, and of each unit of guidance of the k named ones.
            kept: `[n, m]` in how far rows that stay make the moves of words.
            goes: `[n, n]` in how far words do.
        """
        count, named = len(goes), self._named
        ahead, both = products[:count, :count], products[count:, :count]
        past = products[count:, count:]
        guided = kept[:named]
        self._own = self._own + own
        parts = (
            (kept * (ahead @ kept)).sum(0),
            2.0 * (guided * (both @ kept)).sum(0),
            (guided * (past @ guided)).sum(0),
        )
        self._moved = [a + b for a, b in zip(self._moved, parts, strict=True)]
        self._way = self._way + ahead.diagonal()
        went = ((ahead * goes.mT).sum(1), (both.mT * goes[:named].mT).sum(1))
        self._gone = [a + b for a, b in zip(self._gone, went, strict=True)]

    def point(self, guidance: float) -> dict[str, float]:
        """Mean share of each group of rows that are where they should be."""
        a, b, c = self._moved
        size = (a + guidance * b + guidance**2 * c).clamp_min(0.0).sqrt()
        kept = stays(size / self._own.sqrt().clamp_min(1e-300)).split(self._counts)
        way = self._way.clamp_min(1e-300)
        left = 1.0 - (self._gone[0] + guidance * self._gone[1]) / way
        named, mined = gone(left).split([self._named, len(left) - self._named])
        found = {"named": named, "relatives": kept[0], "things": kept[1], "unlisted": mined}
        return {name: float(share.mean()) for name, share in found.items() if len(share)}
