"""RECE (Gong et al., arXiv 2407.12383): UCE, then rounds that undo what still says the concept.

A round derives, in closed form, the embedding c' whose keys and values in the *edited* model come
nearest to the concept's in the original,

    c' = (r I + sum_l W'_l^T W'_l)^-1 (sum_l W'_l^T W_l) c

(equation 8 in our reading), and sends c' to the anchor with UCE's closed form.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from baselines import Rows, uce
from baselines.phrases import ANCHORS, Phrases, anchor_of, matrices, rewrite
from realera_fast.text import Concept


@dataclass(frozen=True)
class Settings:
    """Defaults: the authors' for easy objects."""

    ridge: float = 0.1
    preserve_scale: float = 0.1
    regularization: float = 1e-1
    """r; 1e-3 for styles and hard objects."""
    rounds: int = 1
    """2 for unsafe concepts, 3 for nudity."""
    vocabulary: bool = False
    """Keep the tokenizer's other words too, not the empty prompt alone."""
    anchors: Mapping[str, str] = field(default_factory=lambda: dict(ANCHORS))


SWEEP = (
    Settings(),
    Settings(regularization=1e-3),
    *(
        Settings(
            regularization=r, rounds=rounds, vocabulary=True, anchors=ANCHORS | {"object": anchor}
        )
        for anchor in ("", "object")
        for r in (1e-1, 1e-3)
        for rounds in (1, 2)
    ),
)
"""What is tried on words that are not judged; the authors' settings come first."""


def erase(pipe: Any, concepts: Sequence[Concept], settings: Settings, seed: int = 0) -> None:
    """Edits every K and V; every row of the bare phrase follows that row of the anchor."""
    phrases = Phrases(pipe)
    pairs = [(w, anchor_of(c, settings.anchors)) for c in concepts for w in c.words]
    source, destination = (phrases.rows([pair[i] for pair in pairs]).flatten(0, 1) for i in (0, 1))
    kept = phrases.rows([""]).flatten(0, 1)
    if settings.vocabulary:
        kept = torch.cat([kept, phrases.last(phrases.kept(concepts))])
    scale = torch.full((len(kept),), settings.preserve_scale)

    def edit(weights: list[Tensor]) -> list[Tensor]:
        def towards(now: list[Tensor], moving: Tensor) -> list[Tensor]:
            rows = Rows(
                torch.cat([moving, kept]),
                torch.cat([destination, kept]),
                torch.cat([torch.ones(len(moving)), scale]),
            )
            return uce.edit(now, rows, settings.ridge)

        edited = towards(weights, source)
        for _ in range(settings.rounds):
            edited = towards(edited, adversarial(weights, edited, source, settings.regularization))
        return edited

    rewrite(matrices(pipe.unet), edit)


def adversarial(
    weights: Sequence[Tensor], edited: Sequence[Tensor], rows: Tensor, regularization: float
) -> Tensor:
    """`[n, d]` what the edited weights read most like the original ones read `rows`."""
    gram = sum(w.T.double() @ w.double() for w in edited)
    cross = sum(w.T.double() @ v.double() for w, v in zip(edited, weights, strict=True))
    assert isinstance(gram, Tensor) and isinstance(cross, Tensor)
    gram.diagonal().add_(regularization)
    return torch.linalg.solve(gram, cross @ rows.T.double()).T.to(rows.dtype)
