"""The metric of what attention writes of text."""

from __future__ import annotations

import pytest
import torch
from tiny_families import FAMILIES
from tiny_models import tiny_pipeline

from realera_fast.models import projections, streams, value_gram


def of_stream(model, stream):
    kinds = streams(model)
    return {name: m for name, m in projections(model).items() if kinds[name] == stream}


def test_it_is_the_product_of_what_attention_writes():
    """Of two rows, by the stock attention's own maps, one layer after the other."""
    unet = tiny_pipeline().unet
    layers = of_stream(unet, "sequence")
    width = next(iter(layers.values())).in_features
    x, y = torch.randn(2, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = 0.0
    for name, module in unet.named_modules():
        if name.endswith("attn2"):
            value, output = module.to_v.weight.double(), module.to_out[0].weight.double()
            expected += float((output @ (value @ x)) @ (output @ (value @ y)))
    assert float(x @ value_gram(unet, layers, width) @ y) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("family", ["flux", "sd3", "pixart_sigma"])
def test_without_values_it_is_the_sum_of_the_entrances_own(family):
    pipe = FAMILIES[family]()
    layers = of_stream(pipe.transformer, "sequence")
    width = next(iter(layers.values())).in_features
    weights = [layer.weight.double() for layer in layers.values()]
    expected = sum(weight.mT @ weight for weight in weights)
    torch.testing.assert_close(value_gram(pipe.transformer, layers, width), expected)


def test_columns_that_are_no_text_are_left_out():
    pipe = FAMILIES["sdxl"]()
    layers = of_stream(pipe.unet, "pooled")
    gram = value_gram(pipe.unet, layers, 8)
    weight = next(iter(layers.values())).weight[:, :8].double()
    torch.testing.assert_close(gram, weight.mT @ weight)
