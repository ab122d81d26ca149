"""The closed form where value projections speak: their factors for all named words together."""

from __future__ import annotations

import torch

from realera_fast.equations import Equations
from realera_fast.inputs import VALUES, Job
from realera_fast.mining import KnownWords
from realera_fast.models import LoraFactors
from realera_fast.selection import Selection
from realera_fast.solver import move_values


def value_factors(
    job: Job, selection: Selection, known: KnownWords, equations: Equations
) -> dict[str, LoraFactors]:
    """Updates of the value projections by layer name, of one rank for each named word.

    A named word's outputs c become a + g (a / 2 - c) with those of its anchor a and
    g = `ClosedFormConfig.value_guidance`; a is what the mean word's are where nothing else is
    chosen. What stays is the prior, words that were named to stay and words at risk.

    Args:
        known: reads words of the token sequence.
        equations: of the token sequence.
    """
    options = job.config.closed_form
    pairs = [(word, concept) for concept in selection.concepts for word in concept.words]
    named = known.rows_of([word for word, _ in pairs])
    anchors = torch.stack([selection.anchor_row(known, concept) for _, concept in pairs])
    guidance = options.value_guidance
    goals = (1.0 + guidance / 2) * anchors - guidance * named
    moment = equations.staying.scaled(1.0).gram
    found = {}
    for name, layer in job.layers.items():
        if name.endswith(VALUES):
            weight = layer.weight[:, : named.shape[1]]
            up, down = move_values(weight, moment, named, goals, ridge=options.value_ridge)
            found[name] = LoraFactors(down, up)
    return found
