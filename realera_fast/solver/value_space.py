"""The closed form in the space of what a layer makes of the text, one solve for each layer.

``W' = W T`` can take a concept out of the text, but a layer that narrows the text lets others say
the same: where W has fewer outputs than features, every output can still be reached. Here the
outputs y = W x are moved themselves, ``W' = R W``: text that says the same gets what R makes of it.

With B = W C W^T / mean(diag) + ridge I, where C is the second moment of what stays, outputs
Y = W X of the words that move with goals Z, and their weights D, R minimises

    tr((R Y - Z) D (R Y - Z)^T) + tr((R - I) B (R - I)^T)

and by the matrix inversion lemma R - I = (Z - Y) (D^-1 + Y^T B^-1 Y)^-1 Y^T B^-1: one rank for each
word. The ridge is what makes the edit reach words that nobody lists: a direction in which the layer
says much is worth more than one that tells listed words apart.

That values are edited in the space of the layer's outputs follows OCE (Sun et al., arXiv
2605.28902), which rotates them; least squares with a ridge and goals are this library's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from realera_fast.runtime import full_precision
from realera_fast.solver.concept_map import compressed

NAMED_WEIGHT = 1e4
"""Weight of a named word's outputs, of mean length 1, beside what stays (ours: they arrive)."""


class ValueSystem:
    """The words that move and what stays, as one layer speaks of them. Float64, on its device."""

    @full_precision()
    def __init__(self, weight: Tensor, moment: Tensor, words: Tensor) -> None:
        """
        Args:
            weight: `[o, d]` W of any floating dtype.
            moment: `[d, d]` second moment C of text that stays, of any scale.
            words: `[n, d]` text of the words that move.

        Raises:
            ValueError: shapes that do not fit.
        """
        width = weight.shape[1]
        if words.dim() != 2 or words.shape[1] != width:
            raise ValueError(f"words: expected [n, {width}], got {list(words.shape)}")
        if moment.shape != (width, width):
            raise ValueError(f"moment: expected [{width}, {width}], got {list(moment.shape)}")
        self.weight = weight.detach().to(torch.float64)
        held = self.weight @ moment.to(self.weight) @ self.weight.mT
        # Nothing stays, or nothing of it passes the layer: the ridge alone holds.
        self.held = held / held.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
        """`[o, o]` W C W^T of mean diagonal 1."""
        self.outputs = self.weight @ words.to(self.weight).mT
        """`[o, n]` Y, in the layer's own units."""

    def held_by(self, ridge: float) -> ValueMoves:
        """The moves of the words where what stays is held with this ridge.

        Args:
            ridge: in units of the mean second moment of the outputs that stay; greater than 0.

        Raises:
            ValueError: it is not finite and greater than 0.
        """
        return ValueMoves(self, ridge)


class ValueMoves:
    """How rows follow the words that move, for one ridge."""

    @full_precision()
    def __init__(self, system: ValueSystem, ridge: float) -> None:
        check_value_ridge(ridge)
        self._system = system
        held, outputs = system.held.clone(), system.outputs
        held.diagonal().add_(ridge)
        length = outputs.norm(dim=0).mean().clamp_min(torch.finfo(torch.float64).tiny)
        self._inverse = torch.cholesky_solve(outputs, torch.linalg.cholesky(held))
        self._inverse /= length.square()
        self._gram = outputs.mT @ self._inverse

    @full_precision()
    def answers(self, rows: Tensor) -> Tensor:
        """`[n, m]` Y^T B^-1 W x of `[m, d]` rows x: how much of each word they hear."""
        weight = self._system.weight
        return self._inverse.mT @ (weight @ rows.to(weight).mT)

    @full_precision()
    def moves(self, answers: Tensor, weights: Tensor) -> Tensor:
        """`[n, m]` in how far each row makes the move of each word.

        Args:
            answers: `[n, m]` those of the rows.
            weights: `[n]` of the words; 0 leaves one out.
        """
        weights = weights.to(self._gram)
        used = weights > 0
        small = self._gram[used][:, used]
        small.diagonal().add_(1.0 / weights[used])
        found = torch.zeros_like(answers)
        found[used] = torch.linalg.solve(small, answers[used])
        return found

    @full_precision()
    def factors(
        self, goals: Tensor, weights: Tensor, *, rank_tolerance: float
    ) -> tuple[Tensor, Tensor]:
        """Factors of R W - W, the update of the layer.

        Args:
            goals: `[n, d]` text whose outputs the words' become.
            weights: `[n]` of the words, whose outputs have mean length 1; 0 leaves one out.
            rank_tolerance: singular values at or below this fraction of the greatest are dropped.

        Returns:
            `[o, k]` up and `[k, d]` down of the least rank, float32 on the CPU: W' = W + up @ down.

        Raises:
            ValueError: goals of another shape than the words.
        """
        weight, outputs = self._system.weight, self._system.outputs
        shape = (outputs.shape[1], weight.shape[1])
        if goals.shape != shape:
            raise ValueError(f"goals: expected {list(shape)}, got {list(goals.shape)}")
        down = self.moves(self._inverse.mT @ weight, weights)
        up = weight @ goals.to(weight).mT - outputs
        least = compressed(up, down, rank_tolerance)
        return least.left.to("cpu", torch.float32), least.right.to("cpu", torch.float32)


def check_value_ridge(ridge: float) -> None:
    """Raises ValueError unless it is finite and greater than 0."""
    if not 0.0 < ridge < float("inf"):
        raise ValueError(f"value_ridge: expected a finite number greater than 0, got {ridge}")
