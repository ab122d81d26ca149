"""The closed form in the space of what a layer makes of the text, one solve for each layer.

``W' = W T`` can take a concept out of the text, but a layer that narrows the text lets others say
the same: where W has fewer outputs than features, every output can still be reached. Here the
outputs y = W x are moved themselves, ``W' = R W``: text that says the same gets what R makes of it.

With B = W C W^T / mean(diag) + ridge I, where C is the second moment of what stays, and outputs
Y = W X of the named words with goals Z, R minimises

    weight |R Y - Z|^2 + tr((R - I) B (R - I)^T)

and by the matrix inversion lemma R - I = (Z - Y) (I / weight + Y^T B^-1 Y)^-1 Y^T B^-1: one rank
for each named word. The ridge is what makes the edit reach words that nobody lists: a direction in
which the layer says much is worth more than one that tells listed words apart.

That values are edited in the space of the layer's outputs follows OCE (Sun et al., arXiv
2605.28902), which rotates them; least squares with a ridge and goals are this library's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from realera_fast.runtime import full_precision

_FIRMNESS = 1e4
"""Weight of the named words' outputs, of mean length 1, beside what stays (ours: they arrive)."""


@full_precision()
def move_values(
    weight: Tensor, moment: Tensor, named: Tensor, goals: Tensor, *, ridge: float
) -> tuple[Tensor, Tensor]:
    """Factors of R W - W, the update of one layer.

    Args:
        weight: `[o, d]` W of any floating dtype; computed in float64.
        moment: `[d, d]` second moment C of text that stays, of any scale.
        named: `[n, d]` text of the named words.
        goals: `[n, d]` text whose outputs theirs become.
        ridge: in units of the mean second moment of the outputs that stay; greater than 0.

    Returns:
        `[o, n]` up and `[n, d]` down, float32 on the CPU: W' = W + up @ down.

    Raises:
        ValueError: shapes that do not fit, or a ridge that is not finite and greater than 0.
    """
    width = weight.shape[1]
    if named.shape != goals.shape or named.dim() != 2 or named.shape[1] != width:
        raise ValueError(
            f"named, goals: expected [n, {width}] of the same n, got {list(named.shape)} and "
            f"{list(goals.shape)}"
        )
    if moment.shape != (width, width):
        raise ValueError(f"moment: expected [{width}, {width}], got {list(moment.shape)}")
    check_value_ridge(ridge)
    wide = weight.detach().to(torch.float64)
    staying, x, z = (part.to(wide) for part in (moment, named, goals))
    held = wide @ staying @ wide.mT
    # Nothing stays, or nothing of it passes the layer: the ridge alone holds.
    held /= held.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
    held.diagonal().add_(ridge)
    outputs = wide @ x.mT
    size = outputs.norm(dim=0).mean().clamp_min(torch.finfo(torch.float64).tiny)
    outputs, aims = outputs / size, wide @ z.mT / size
    solved = torch.cholesky_solve(outputs, torch.linalg.cholesky(held))
    small = outputs.mT @ solved
    small.diagonal().add_(1.0 / _FIRMNESS)
    down = torch.linalg.solve(small, solved.mT @ wide)
    return (aims - outputs).to("cpu", torch.float32), down.to("cpu", torch.float32)


def check_value_ridge(ridge: float) -> None:
    """Raises ValueError unless it is finite and greater than 0."""
    if not 0.0 < ridge < float("inf"):
        raise ValueError(f"value_ridge: expected a finite number greater than 0, got {ridge}")
