"""MACE closed-form refinement (Lu et al., arXiv 2403.06135), equations 1 and 2, as published.

    W' = (ridge W + sum W y x^T) (ridge I + sum x x^T)^-1

over all tokens of all prompts. For each layer and prompt the outer products of the tokens are made
and then summed; one explicit inverse for each layer, in float32. Here the tokens go in blocks: all
of a prompt at once is several hundred megabytes a layer and no faster.

This is the first of MACE's stages. It rewrites the words that stand around a concept, not its own;
the concept itself is left to the second stage (`mace_lora`), which trains on segmented pictures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from baselines import Rows, for_each, working_dtype
from baselines.phrases import ANCHORS, Phrases, anchor_of, matrices, rewrite
from realera_fast.text import Concept, PairsConfig, align

TOKENS = 75
"""Rows of a prompt: 77 tokens of CLIP without the two of the concept."""
_BLOCK = 2**22
"""Numbers in one block of outer products."""
_ROWS = 30 * TOKENS
"""Rows of a concept: 30 prompts."""


@dataclass(frozen=True)
class Settings:
    """Defaults: the authors' for one of their objects (automobile; bird has 10, ship 1,000)."""

    ridge: float = 100.0
    preserve_scale: float = 0.0
    """Weight of each kept word's prompts. The authors' objects keep none."""
    concept_rows: bool = False
    """Map the concept's own rows too. The authors do not."""
    anchors: Mapping[str, str] = field(default_factory=lambda: dict(ANCHORS) | {"object": "object"})


SWEEP = (
    *(Settings(ridge=ridge) for ridge in (100.0, 10.0, 1000.0)),
    *(Settings(ridge=ridge, concept_rows=True) for ridge in (100.0, 10.0, 1000.0)),
    *(Settings(preserve_scale=0.01, concept_rows=own) for own in (False, True)),
)
"""What is tried on words that are not judged; the authors' settings come first."""


def erase(pipe: Any, concepts: Sequence[Concept], settings: Settings, seed: int = 0) -> None:
    """Edits every K and V; rows are the words around the concept in all templates of its kind."""
    phrases = Phrases(pipe)
    found: list[Rows] = []
    for concept in concepts:
        templates = [t for t in PairsConfig().of(concept.kind) if "{word}" not in t]
        for word in concept.words:
            pairs = align(phrases.text, word, anchor_of(concept, settings.anchors), templates)
            for prompt, template, source, destination in zip(
                pairs.prompts, templates, pairs.source, pairs.destination, strict=True
            ):
                span = phrases.text.span(template.split("{}")[0], word)
                around = torch.ones(len(source), dtype=torch.bool)
                around[span.start : span.stop] = settings.concept_rows
                assert word in prompt
                weight = torch.full(
                    (int(around.sum()),), _ROWS / len(templates) / float(around.sum())
                )
                scaled = (rows[around] * phrases.scale for rows in (source, destination))
                found.append(Rows(*scaled, weight))
    if settings.preserve_scale:
        kept = phrases.rows([f"a photo of a {word}" for word in phrases.kept(concepts)])
        for rows in kept:
            weight = torch.full((len(rows),), settings.preserve_scale * TOKENS / len(rows))
            found.append(Rows(rows, rows, weight))
    every = Rows(*(torch.cat(parts) for parts in zip(*found, strict=True)))
    rewrite(matrices(pipe.unet), lambda weights: edit(weights, every, settings.ridge))


def edit(weights: Sequence[Tensor], rows: Rows | Sequence[Rows], ridge: float) -> list[Tensor]:
    """The edited copies of ``weights``."""
    edited = []
    for weight, (source, destination, scale) in zip(
        weights, for_each(rows, len(weights)), strict=True
    ):
        dtype = working_dtype(weight)
        wide, x, y = weight.to(dtype), source.to(dtype), destination.to(dtype)
        w = scale.to(dtype)[:, None]
        values = ridge * wide
        gram = ridge * torch.eye(wide.shape[1], dtype=dtype, device=wide.device)
        for start in range(0, len(x), TOKENS):
            prompt = slice(start, start + TOKENS)
            weighted = w[prompt] * x[prompt]
            _add_outer_products(values, y[prompt] @ wide.mT, weighted)
            _add_outer_products(gram, x[prompt], weighted)
        edited.append((values @ torch.linalg.inv(gram)).to(weight.dtype))
    return edited


def _add_outer_products(total: Tensor, columns: Tensor, rows: Tensor) -> None:
    block = max(1, _BLOCK // total.numel())
    for a, b in zip(columns.split(block), rows.split(block), strict=True):
        total += (a[:, :, None] * b[:, None, :]).sum(0)
