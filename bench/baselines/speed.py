"""SPEED (Li et al., arXiv 2503.07392): values edited in the null space of what is to be kept.

    min |(W + D P) C1 - W C*|^2 + s |D P|^2   so that   D P C2 = 0

with C1 the targets, C* the anchors, C2 rows that must not move at all (begin-of-text and three
centers of the empty prompt's rows) and P the projector on the directions in which the retained
words have next to no second moment. Retained words are filtered for each layer (those that the edit
without constraints would move more than the mean) and augmented with noise along the directions
that the layer hardly reads. In closed form, T1 = C1 C1^T / n and T* = C* C1^T / n,

    D P = W (T* - T1) P Q M,  M = (T1 P + s I)^-1,  Q = I - M C2 (C2^T P M C2)^-1 C2^T P
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
    """Defaults: the authors' for few concepts."""

    threshold: float = 1e-1
    """Singular values of the retained second moments below it span the null space; 1e-4 for many
    concepts."""
    retain_scale: float = 1.0
    """s; 0.05 for many concepts."""
    augment: int = 10
    """Noisy copies of each retained row."""
    filtered: bool = True
    """Retain only words that the edit would move."""
    both: bool = False
    """Edit keys as well as values. The authors edit values."""
    expand: bool = False
    """Five phrases for each target in place of the bare one."""
    anchors: Mapping[str, str] = field(default_factory=lambda: dict(ANCHORS))


SWEEP = (
    Settings(),
    *(
        Settings(threshold=threshold, retain_scale=scale, both=both, expand=True)
        for both, scale in ((False, 1.0), (False, 0.05), (True, 0.05))
        for threshold in (1e-1, 1.0, 10.0, 30.0)
    ),
)
"""What is tried on words that are not judged; the authors' settings come first."""


def erase(pipe: Any, concepts: Sequence[Concept], settings: Settings, seed: int = 0) -> None:
    """Edits values (and keys); one row for each phrase, that of its last token."""
    phrases = Phrases(pipe)
    pairs = pairs_of(concepts, settings.anchors, expand=settings.expand)
    targets, anchors = (phrases.last([pair[i] for pair in pairs]).double() for i in (0, 1))
    retained = phrases.last(phrases.kept(concepts)).double()
    empty = phrases.rows([""])[0].double()
    fixed = torch.cat([empty[:1], _centers(empty[1:], 3)])
    target_moment = targets.T @ targets / len(targets)
    shift = (anchors - targets).T @ targets / len(targets)
    generator = torch.Generator().manual_seed(seed)

    def layer(weight: Tensor) -> Tensor:
        wide, eye = weight.double(), torch.eye(weight.shape[1], dtype=torch.float64)
        rows = retained
        if settings.filtered:
            plain = wide @ shift @ torch.linalg.inv(target_moment + settings.retain_scale * eye)
            moved = (rows @ plain.T).norm(dim=1)
            rows = rows[moved > moved.mean()]
        if settings.augment:
            unread = torch.linalg.eigh(wide.T @ wide).eigenvectors[:, :1]
            noise = torch.randn(
                (settings.augment, len(rows), 1), generator=generator, dtype=torch.float64
            )
            # Noise projected on the least read direction, of the size of a row's own elements.
            rows = torch.cat([rows, (rows + noise * unread.T).flatten(0, 1)])
        values, vectors = torch.linalg.eigh(rows.T @ rows / len(rows))
        null = vectors[:, values < settings.threshold]
        projector = null @ null.T
        inverse = torch.linalg.inv(target_moment @ projector + settings.retain_scale * eye)
        read = projector @ inverse @ fixed.T
        inner = torch.linalg.pinv(fixed @ read)
        free = eye - inverse @ fixed.T @ inner @ fixed @ projector
        return (wide + wide @ shift @ projector @ free @ inverse).to(weight.dtype)

    leaves = ("to_k", "to_v") if settings.both else ("to_v",)
    rewrite(matrices(pipe.unet, leaves), lambda weights: [layer(w) for w in weights])


def _centers(rows: Tensor, count: int, rounds: int = 20) -> Tensor:
    """`[count, d]` k-means centers, from evenly spread rows."""
    places = torch.linspace(0, len(rows) - 1, count).long()
    centers = rows[places].clone()
    for _ in range(rounds):
        owner = torch.cdist(rows, centers).argmin(dim=1)
        for i in range(count):
            if bool((owner == i).any()):
                centers[i] = rows[owner == i].mean(dim=0)
    return centers
