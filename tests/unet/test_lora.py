"""LoRA factors: shapes, starting values, scaling."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_models import tiny_unet

from realera_fast.models import LoraFactors, projections, queries_and_outputs
from realera_fast.unet import LoraParameters


def parameters(seed=1, **options) -> LoraParameters:
    unet = tiny_unet()
    hidden = {n: x for n, x in queries_and_outputs(unet).items() if n.endswith("to_q")}
    return LoraParameters(
        projections(unet), hidden, seed=seed, **({"r": 4, "lora_alpha": 4.0} | options)
    )


def test_starting_values_come_from_the_seed_alone():
    state = torch.random.get_rng_state()
    found = []
    for seed in (1, 1, 2):
        found.append(parameters(seed).down.detach().flatten())
        assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
    assert found[0].abs().max() <= 1 / math.sqrt(32)
    # Uniform on +-b: variance b^2 / 3, whose estimate has the deviation sqrt(4 / (5 n)) of it.
    variance = float(found[0].square().mean()) * 3 * 32
    assert abs(variance - 1) < 4 * math.sqrt(0.8 / len(found[0]))


def test_every_layer_has_factors_and_they_change_nothing_yet():
    lora = parameters()
    names = list(projections(tiny_unet()))
    assert lora.names == names and lora.down.shape == (8, 4, 32)
    assert lora.up.shape == (sum(lora.heights), 4) and not lora.up.any()
    assert len(lora.hidden) == 4 and len(lora.parameters()) == 10
    assert all(p.dtype == torch.float32 and p.requires_grad for p in lora.parameters())
    hidden = torch.randn(2, 5, 16)
    assert torch.equal(lora.add_hidden("no such layer", hidden, hidden), hidden)


@pytest.mark.parametrize(("rslora", "scaling"), [(False, 1.5), (True, 3.0)])
def test_scaling_is_pefts_and_is_folded_into_up(rslora, scaling):
    lora = parameters(lora_alpha=6.0, use_rslora=rslora)
    assert lora.scaling == scaling
    with torch.no_grad():
        for parameter in lora.parameters():
            parameter.normal_()
    factors = lora.factors()
    assert list(factors) == [*lora.names, *lora.hidden]
    start = 0
    for number, (name, height) in enumerate(zip(lora.names, lora.heights, strict=True)):
        wanted = scaling * lora.up[start : start + height] @ lora.down[number]
        torch.testing.assert_close(factors[name].delta, wanted.detach())
        start += height
    name, (down, up) = next(iter(lora.hidden.items()))
    hidden = torch.randn(2, 5, down.shape[1])
    added = lora.add_hidden(name, hidden, torch.zeros(2, 5, up.shape[0])).detach()
    torch.testing.assert_close(added, hidden @ factors[name].delta.T)


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="r: expected at least 1, got 0"):
        parameters(r=0)
    for alpha in (0.0, float("nan")):
        with pytest.raises(ValueError, match="lora_alpha: expected a positive"):
            parameters(lora_alpha=alpha)


def test_factors_check_their_shapes():
    down, up = torch.zeros(2, 8), torch.ones(6, 2)
    factors = LoraFactors(down + 1, up)
    assert factors.rank == 2 and torch.equal(factors.delta, torch.full((6, 8), 2.0))
    with pytest.raises(ValueError, match=r"got \[2, 8\] and \[6, 3\]"):
        LoraFactors(down, torch.ones(6, 3))
    with pytest.raises(ValueError, match="expected float32"):
        LoraFactors(down.half(), up)
