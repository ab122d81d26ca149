"""UCE (Gandikota et al., arXiv 2308.14761), equation 7, looped as it is published.

    W' = (ridge W + sum_i w_i (W y_i) x_i^T) (ridge I + sum_i w_i x_i x_i^T)^-1

One outer product for each row and layer, one explicit inverse for each layer, in float32. Rows to
preserve are rows whose destination is their source.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from baselines import Rows, for_each, working_dtype
from baselines.phrases import ANCHORS, UNIT, Phrases, matrices, pairs_of, rewrite
from realera_fast.models import streams
from realera_fast.text import Concept


@dataclass(frozen=True)
class Settings:
    """Defaults: the authors'."""

    ridge: float = 0.5
    erase_scale: float = 1.0
    preserve_scale: float = 0.0
    """Weight of each kept word. The command keeps none unless told which."""
    anchors: Mapping[str, str] = field(default_factory=lambda: dict(ANCHORS))
    expand: bool = False


SWEEP = (
    Settings(),
    *(
        Settings(
            erase_scale=scale,
            preserve_scale=preserve,
            expand=True,
            anchors=ANCHORS | {"object": anchor},
        )
        for anchor in ("", "object")
        for preserve in (0.0, 0.1, 1.0)
        for scale in (1.0, 10.0)
    ),
)
"""What is tried on words that are not judged; the authors' settings come first."""


def erase(pipe: Any, concepts: Sequence[Concept], settings: Settings, seed: int = 0) -> None:
    """Edits every K and V; one row for each phrase, that of its last token."""
    phrases = Phrases(pipe)
    pairs = pairs_of(concepts, settings.anchors, expand=settings.expand)
    source, destination = (phrases.last([pair[i] for pair in pairs]) for i in (0, 1))
    weight = torch.full((len(pairs),), settings.erase_scale)
    if settings.preserve_scale:
        kept = phrases.last(phrases.kept(concepts))
        source, destination = torch.cat([source, kept]), torch.cat([destination, kept])
        weight = torch.cat([weight, torch.full((len(kept),), settings.preserve_scale)])
    rows = Rows(source, destination, weight)
    rewrite(matrices(pipe.unet), lambda weights: edit(weights, rows, settings.ridge))


@torch.no_grad()
def erase_entries(
    transformer: Any,
    texts: Mapping[Any, Sequence[Any]],
    concepts: Sequence[Concept],
    settings: Settings,
) -> None:
    """Edits the maps by which text enters a transformer, as the published code does for FLUX.

    Args:
        transformer: edited in place.
        texts: what each stream of `realera_fast.models.streams` reads.
    """
    pairs = pairs_of(concepts, settings.anchors, expand=settings.expand)
    for name, stream in streams(transformer).items():
        text = texts[stream][0]

        def last(phrases: Sequence[str], text: Any = text) -> Tensor:
            distinct = list(dict.fromkeys(phrases))
            rows = text.encode(distinct).float()
            place = torch.zeros(len(distinct), dtype=torch.long)
            if rows.shape[1] > 1:
                # T5 has nothing in front of the end of an empty phrase.
                place = (torch.tensor(text.ends(distinct)) - 1).clamp_min(0)
            rows = rows[torch.arange(len(rows)), place]
            return rows[[distinct.index(phrase) for phrase in phrases]]

        source, destination = (last([pair[i] for pair in pairs]) for i in (0, 1))
        scale = (UNIT / last(["a photo of a"]).square().sum()).sqrt()
        weight = torch.full((len(pairs),), settings.erase_scale)
        rows = Rows(source * scale, destination * scale, weight)
        rewrite(
            [transformer.get_submodule(name)],  # type: ignore[list-item]
            lambda weights, rows=rows: edit(weights, rows, settings.ridge),
        )


def edit(weights: Sequence[Tensor], rows: Rows | Sequence[Rows], ridge: float) -> list[Tensor]:
    """The edited copies of ``weights``."""
    edited = []
    for weight, (source, destination, scale) in zip(
        weights, for_each(rows, len(weights)), strict=True
    ):
        dtype = working_dtype(weight)
        wide, x, y = weight.to(dtype), source.to(dtype), destination.to(dtype)
        values = ridge * wide
        gram = ridge * torch.eye(wide.shape[1], dtype=dtype, device=wide.device)
        for row, target, w in zip(x, y, scale.to(dtype), strict=True):
            values += w * torch.outer(wide @ target, row)
            gram += w * torch.outer(row, row)
        edited.append((values @ torch.linalg.inv(gram)).to(weight.dtype))
    return edited
