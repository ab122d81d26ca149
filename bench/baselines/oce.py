"""OCE (Sun et al., arXiv 2605.28902): values are rotated, W' = R W with R orthogonal.

R is the polar factor of

    M = -a G (I - G*) + b sum_p (W p) (W p)^T + g W C W^T + l W W^T

(orthogonal Procrustes), where G and G* project on what the layer makes of the targets and of the
anchors, p are words to keep, and C is the mean second moment of general prompts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from baselines.phrases import ANCHORS, Phrases, matrices, pairs_of, rewrite
from realera_fast.text import Concept


@dataclass(frozen=True)
class Settings:
    """Defaults: the authors'."""

    erase_scale: float = 1.0
    preserve_global_scale: float = 0.5
    preserve_concept_scale: float = 0.0
    """Theirs is 0.3 for words that the user names; nobody names any here."""
    ridge: float = 1.5
    expand: bool = False
    anchors: Mapping[str, str] = field(default_factory=lambda: dict(ANCHORS))


SWEEP = (
    Settings(),
    *(
        Settings(erase_scale=scale, preserve_concept_scale=keep, expand=expand)
        for scale, keep in (
            *((scale, 0.0) for scale in (300.0, 1000.0, 3000.0, 30000.0)),
            *((scale, 0.3) for scale in (3000.0, 30000.0)),
        )
        for expand in (False, True)
    ),
    *(Settings(erase_scale=scale, preserve_concept_scale=0.3) for scale in (300.0, 1000.0)),
)
"""What is tried on words that are not judged; the authors' settings come first. Scales are against
the size of the layer's outputs, which is not that of Stable Diffusion's."""


def erase(pipe: Any, concepts: Sequence[Concept], settings: Settings, seed: int = 0) -> None:
    """Rotates every V; one row for each phrase, that of its last token."""
    phrases = Phrases(pipe)
    pairs = pairs_of(concepts, settings.anchors, expand=settings.expand)
    targets, anchors = (phrases.last([pair[i] for pair in pairs]).double() for i in (0, 1))
    words = phrases.kept(concepts)
    general = phrases.rows([f"a photo of a {word}" for word in words])
    shares = phrases.text.shares(["a photo of a cat"])[0] > 0
    general = general[:, shares].flatten(0, 1).double()
    moment = general.T @ general / len(general)
    kept = phrases.last(words).double() if settings.preserve_concept_scale else None

    def rotate(weight: Tensor) -> Tensor:
        wide = weight.double()
        eye = torch.eye(len(wide), dtype=torch.float64, device=wide.device)
        erased, guide = _projector(wide @ targets.T), _projector(wide @ anchors.T)
        total = -settings.erase_scale * erased @ (eye - guide)
        if kept is not None:
            outputs = wide @ kept.T
            total += settings.preserve_concept_scale * outputs @ outputs.T
        total += settings.preserve_global_scale * wide @ moment @ wide.T
        total += settings.ridge * wide @ wide.T
        left, _, right = torch.linalg.svd(total)
        if torch.linalg.det(left @ right) < 0:
            left[:, -1] *= -1
        return (left @ right @ wide).to(weight.dtype)

    layers = matrices(pipe.unet, ("to_v",))
    rewrite(layers, lambda weights: [rotate(weight) for weight in weights])


def _projector(columns: Tensor) -> Tensor:
    """`[o, o]` on the span of `[o, n]` columns."""
    basis, values, _ = torch.linalg.svd(columns, full_matrices=False)
    basis = basis[:, values > 1e-8 * values.max()]
    return basis @ basis.T
