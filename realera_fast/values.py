"""The closed form where value projections speak: their factors for all named words together."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from realera_fast.equations import Equations
from realera_fast.inputs import VALUES, Job
from realera_fast.mining import KnownWords
from realera_fast.models import LoraFactors
from realera_fast.scales import EDGE, looked_at
from realera_fast.selection import Selection
from realera_fast.solver import move_values

logger = logging.getLogger(__name__)

_SHARES = (1.0, 0.5, 0.25, 0.0)
"""Of the guidance that was asked for, what is tried (ours)."""
_ENOUGH = 0.95
"""Share of things that should stay, and do, with which a guidance is taken (ours: one concept of
the embedded model leaves 98 % and more with all of it, five 98 % with a quarter, ten 96 % without
any)."""
_TOO_FEW = 0.5
"""Fewer than that: what is left is not the user's model (ours: pictures of thirty concepts, which
leave less than 1 %, show one other thing in three)."""


@dataclass(frozen=True)
class MovedValues:
    """Updates of value projections, and how they were chosen."""

    factors: Mapping[str, LoraFactors]
    """By layer name, of one rank for each named word."""
    guidance: float
    """How far past the anchor named words go, at most `ClosedFormConfig.value_guidance`."""


def moved_values(
    job: Job, selection: Selection, known: KnownWords, equations: Equations
) -> MovedValues:
    """Moves the outputs of named words as far past their anchors as leaves things in place.

    A named word's outputs c become a + g (a / 2 - c) with those of its anchor a; a is what the
    mean word's are where nothing else is chosen. What stays is the prior, words that were named to
    stay and words at risk. Of several words together g is less than was asked for, until things
    that should stay move less than `scales.EDGE` of their way to the mean word.

    Args:
        known: reads words of the token sequence.
        equations: of the token sequence.

    Raises:
        ValueError: so many words go together that what should stay goes with them.
    """
    options = job.config.closed_form
    pairs = [(word, concept) for concept in selection.concepts for word in concept.words]
    named = known.rows_of([word for word, _ in pairs])
    anchors = torch.stack([selection.anchor_row(known, concept) for _, concept in pairs])
    things = looked_at(known, selection).things
    moment = equations.staying.scaled(1.0).gram
    layers = {name: layer for name, layer in job.layers.items() if name.endswith(VALUES)}
    kept = 0.0
    for share in _SHARES if options.value_guidance else (0.0,):
        guidance = share * options.value_guidance
        goals = (1.0 + guidance / 2) * anchors - guidance * named
        found = {}
        for name, layer in layers.items():
            weight = layer.weight[:, : named.shape[1]]
            up, down = move_values(weight, moment, named, goals, ridge=options.value_ridge)
            found[name] = LoraFactors(down, up)
        kept = _kept(layers, found, things - known.space.mean.to(things), things)
        logger.info("values: guidance %g keeps %.1f %% of things", guidance, 100 * kept)
        if kept >= _ENOUGH:
            break
    if kept < _TOO_FEW and len(pairs) > 1:
        raise ValueError(
            f'config: closed_form.space="values" would move {1 - kept:.0%} of the things that '
            f"should stay, as {len(pairs)} words go together; erase fewer at once, or set "
            'closed_form.space="text"'
        )
    return MovedValues(found, guidance)


def _kept(
    layers: Mapping[str, nn.Linear], factors: Mapping[str, LoraFactors], own: Tensor, rows: Tensor
) -> float:
    """Share of `[n, d]` rows that stay; all where there are none.

    Args:
        own: `[n, d]` the rows seen from the mean word.
    """
    if not len(rows):
        return 1.0
    moved, whole = rows.new_zeros(len(rows)), rows.new_zeros(len(rows))
    for name, part in factors.items():
        weight = layers[name].weight.detach()[:, : rows.shape[1]].to("cpu", torch.float32)
        moved += ((rows @ part.down.mT) @ part.up.mT).square().sum(1)
        whole += (own @ weight.mT).square().sum(1)
    return float((moved.sqrt() < EDGE * whole.sqrt()).float().mean())
