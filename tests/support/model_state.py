"""A model's tensors before and after something was done to it."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all tensors of a model, by name."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(model: nn.Module, before: dict[str, Tensor]) -> bool:
    """Whether a model has exactly these tensors, in this order."""
    after = model.state_dict()
    # Compared as bytes: equality of numbers would miss the sign of a zero.
    return list(after) == list(before) and all(
        after[name].dtype == tensor.dtype and torch.equal(_bytes(after[name]), _bytes(tensor))
        for name, tensor in before.items()
    )


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Whether two sets of tensors have the same names and numbers."""
    return one.keys() == other.keys() and all(torch.equal(t, other[n]) for n, t in one.items())


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().reshape(-1).view(torch.uint8)
