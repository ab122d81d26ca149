"""How far apart two texts are to a denoiser: measured at what its attention writes of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from realera_fast.models.dense import UnreadableWeightError, dense_weight
from realera_fast.runtime import unwrapped

_VALUE, _OUTPUT = ".to_v", ".to_out.0"


@torch.no_grad()
def value_gram(
    model: Any,
    layers: Mapping[str, nn.Linear],
    width: int,
    originals: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """`[d, d]` float64 M, so that x^T M y is the product of what is written of rows x and y.

    M = sum over layers of (W_o W_v)^T W_o W_v, where a layer's values have an output map behind
    them. Two words that lie far apart in the text but are drawn alike lie near each other there:
    the model was trained to make the same picture of both, and the map from text to picture begins
    with these weights (ours). Keys only say where it is drawn. Where text meets other maps first
    (`context_embedder`), M is the sum of their own.

    Args:
        layers: linear maps that one stream of text enters the model through, by module name.
        width: features d of a row, the first columns of every weight.
        originals: `[o, d]` weights of layers that erasures have changed, before them: what was
            erased is not what a word means.
    """
    originals = originals or {}
    values = {n: layer for n, layer in layers.items() if n.endswith(_VALUE)} or dict(layers)
    outward = output_maps(model, values, originals)
    device = dense_weight(next(iter(values.values()))).device
    total = torch.zeros(width, width, dtype=torch.float64, device=device)
    for name, layer in values.items():
        weight = originals[name] if name in originals else dense_weight(layer)
        weight = weight.to(device)[:, :width].float()
        if name in outward:
            weight = outward[name].to(device).float() @ weight
        total += (weight.mT @ weight).double()
    return total


def output_maps(
    model: Any, values: Mapping[str, nn.Linear], originals: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """`[p, o]` weights W_o behind value projections, by the names of these, where there are any.

    Args:
        values: of `[o, d]` weights, by module name.
        originals: weights of layers that erasures have changed, before them.
    """
    modules = dict(unwrapped(model).named_modules())
    found = {}
    for name, layer in values.items():
        behind = name.removesuffix(_VALUE) + _OUTPUT
        output = modules.get(behind)
        if isinstance(output, nn.Linear) and output.in_features == layer.out_features:
            try:
                found[name] = originals[behind] if behind in originals else dense_weight(output)
            except UnreadableWeightError as error:
                raise ValueError(f"model: the weight of {behind} can't be read: {error}") from error
    return found
