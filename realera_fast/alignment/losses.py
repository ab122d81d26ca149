"""What the student is asked of a concept: to follow a goal, or to be nearer to it than to the
concept.

`eps(A)` and `eps(E)` are what the original model predicts for the anchor and for the concept, `s`
what the student predicts, `g` is `AlignmentConfig.negative_guidance`. The goal of all losses is the
same place, past the anchor on the line through both: `eps(A) - g (eps(E) - eps(A))`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

Loss: TypeAlias = Literal["guided", "triplet", "adversarial_target"]
LOSSES: tuple[Loss, ...] = ("guided", "triplet", "adversarial_target")


@dataclass(frozen=True)
class TargetLoss:
    """The loss of rows that are to lose the concept."""

    name: Loss
    guidance: float = 0.0
    """g."""
    eta: float = 1.0
    """How much the distance to the concept counts, 0 to 1; of "triplet"."""

    def __call__(self, student: Tensor, goal: Tensor, shown: Tensor | None) -> Tensor:
        """`[b]` losses of rows.

        Args:
            student: `[b, c, h, w]` predictions s.
            goal: `[b, c, h, w]` predictions that the line leads to.
            shown: `[b, c, h, w]` eps(E); "guided" needs none.
        """
        if self.name != "triplet":
            return _distance(student, goal)
        assert shown is not None
        concept = shown.to(student)
        anchor = (goal.to(student) + self.guidance * concept) / (1.0 + self.guidance)
        # Squares: the gradient of a plain distance has no direction where it is 0, and the student
        # starts where the concept is. The margin puts the hinge at the goal, where plain distances
        # stop half-way; on the line it is the only one while g < eta / (1 - eta).
        margin = self.eta * (1.0 + self.guidance) ** 2 - self.guidance**2
        nearer = _distance(student, anchor) - self.eta * _distance(student, concept)
        return torch.relu(nearer + margin * _distance(anchor, concept))


GUIDED = TargetLoss("guided")


def _distance(first: Tensor, second: Tensor) -> Tensor:
    """`[b]` mean squares of differences."""
    return (first - second.to(first)).square().flatten(1).mean(dim=1)
