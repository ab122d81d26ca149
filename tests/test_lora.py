"""LoRA factors through peft: attach, extract, detach."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from conftest import check
from tiny_models import tiny_unet

from realera_fast import lora
from realera_fast.lora import LoraFactors
from realera_fast.unet import projections, transaction

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def inputs(dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(2, 4, 8, 8, generator=generator).to(dtype)
    return latents, 5, torch.randn(2, 7, 32, generator=generator).to(dtype)


def train(unet, parameters, steps=2):
    optimizer = torch.optim.SGD(parameters, lr=0.5)
    for _ in range(steps):
        optimizer.zero_grad()
        unet(*inputs(unet.dtype)).sample.float().square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_round_trip_leaves_the_model_as_it_was(dtype):
    unet = tiny_unet(dtype=dtype)
    unet.train()
    unet.conv_in.requires_grad_(False)
    modules = dict(unet.named_modules())
    weights = {n: (id(p), p.requires_grad, p.clone()) for n, p in unet.named_parameters()}
    with torch.no_grad():
        before = unet(*inputs(dtype)).sample

    names = list(projections(unet))
    parameters = lora.attach(unet, names, 4, seed=1)
    assert len(parameters) == 16 and all(p.dtype == torch.float32 for p in parameters)
    assert {id(p) for p in unet.parameters() if p.requires_grad} == {id(p) for p in parameters}
    with torch.no_grad():
        assert torch.equal(unet(*inputs(dtype)).sample, before), "up starts at zero"
    train(unet, parameters)
    with torch.no_grad():
        after = unet(*inputs(dtype)).sample
        assert after.dtype == dtype and not torch.equal(after, before)

    lora.detach(unet)
    assert dict(unet.named_modules()) == modules
    assert not hasattr(unet, "peft_config") and unet.training
    for name, parameter in unet.named_parameters():
        identity, requires_grad, value = weights[name]
        assert (id(parameter), parameter.requires_grad) == (identity, requires_grad)
        assert torch.equal(parameter, value)
    with torch.no_grad():
        assert torch.equal(unet(*inputs(dtype)).sample, before)
    lora.detach(unet)


def test_extract_reproduces_the_adapter_with_its_scaling():
    unet, exact = tiny_unet(), tiny_unet(dtype=torch.float64)
    layers = projections(unet)
    names = list(layers)[1:5]
    parameters = lora.attach(unet, names, 2, alpha=6.0, seed=1)
    train(unet, parameters)
    factors = lora.extract(unet)
    assert list(factors) == names
    with torch.no_grad():
        adapted = unet(*inputs()).sample
        lora.detach(unet)
        plain = unet(*inputs()).sample
        for name in names:
            assert factors[name].rank == 2 and factors[name].up.any()
            layers[name].weight += factors[name].delta
            wide = factors[name].up.double() @ factors[name].down.double()
            exact.get_submodule(name).weight += wide
        reference = exact(*inputs(torch.float64)).sample
        check("adapter", adapted, reference, unet(*inputs()).sample)
    with pytest.raises(AssertionError):
        check("without the adapter", plain, reference, adapted)


def test_initialization_comes_from_the_seed_alone():
    found = []
    for seed in (1, 1, 2):
        unet = tiny_unet()
        lora.attach(unet, list(projections(unet)), 4, seed=seed)
        found.append(torch.cat([f.down.flatten() for f in lora.extract(unet).values()]))
        torch.rand(3)
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
    assert found[0].abs().max() <= 1 / math.sqrt(32)
    # Uniform on +-b: variance b^2 / 3, whose estimate has the deviation sqrt(4 / (5 n)) of it.
    variance = float(found[0].square().mean()) * 3 * 32
    assert abs(variance - 1) < 4 * math.sqrt(0.8 / len(found[0]))


def test_the_global_random_state_is_untouched():
    unet = tiny_unet()
    state = torch.random.get_rng_state()
    lora.attach(unet, list(projections(unet)), 4, seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_disabled_runs_the_base_and_nests():
    unet = tiny_unet()
    with torch.no_grad():
        base = unet(*inputs()).sample
    parameters = lora.attach(unet, list(projections(unet)), 4, seed=1)
    train(unet, parameters)
    with torch.no_grad():
        adapted = unet(*inputs()).sample
        with lora.disabled(unet):
            assert torch.equal(unet(*inputs()).sample, base)
            with lora.disabled(unet):
                assert torch.equal(unet(*inputs()).sample, base)
            assert torch.equal(unet(*inputs()).sample, base)
        assert torch.equal(unet(*inputs()).sample, adapted)
        with pytest.raises(KeyboardInterrupt), lora.disabled(unet):
            raise KeyboardInterrupt
        assert torch.equal(unet(*inputs()).sample, adapted)
    assert all(p.requires_grad for p in parameters)


def test_only_the_named_projections_are_adapted():
    unet = tiny_unet()
    # peft also matches names by their end: this one must not bring its relatives along.
    name = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    lora.attach(unet, [name], 1, seed=0)
    assert [n for n, m in unet.named_modules() if hasattr(m, "lora_A")] == [name]


def test_attach_checks_its_arguments_and_leaves_the_model_alone(monkeypatch):
    unet = tiny_unet()
    names = list(projections(unet))
    for wrong in (["conv_in"], [], [names[0], names[0]]):
        with pytest.raises(ValueError, match="names: expected some"):
            lora.attach(unet, wrong, 4, seed=1)
    with pytest.raises(ValueError, match="rank: expected at least 1, got 0"):
        lora.attach(unet, names, 0, seed=1)
    for alpha in (0.0, float("nan")):
        with pytest.raises(ValueError, match="alpha: expected a positive"):
            lora.attach(unet, names, 4, alpha=alpha, seed=1)
    for call in (lora.extract, lambda unet: lora.disabled(unet).__enter__()):
        with pytest.raises(ValueError, match="no adapter is attached"):
            call(unet)
    lora.attach(unet, names, 4, seed=1)
    with pytest.raises(ValueError, match="an adapter is attached"):
        lora.attach(unet, names, 4, seed=1)
    lora.detach(unet)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match="pip install peft"):
        lora.attach(unet, names, 4, seed=1)
    assert projections(unet)


def test_a_failed_attach_leaves_no_trace(monkeypatch):
    unet = tiny_unet()
    modules = dict(unet.named_modules())

    def fail(*_args, **_options):
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "rand", fail)
    with pytest.raises(KeyboardInterrupt):
        lora.attach(unet, list(projections(unet)), 4, seed=1)
    assert dict(unet.named_modules()) == modules and not hasattr(unet, "peft_config")
    assert all(p.requires_grad for p in unet.parameters())


def test_a_rolled_back_transaction_detaches_and_attach_works_again():
    unet = tiny_unet()
    names = list(projections(unet))
    with pytest.raises(RuntimeError), transaction(unet):
        lora.attach(unet, names, 4, seed=1)
        raise RuntimeError
    with pytest.raises(ValueError, match="no adapter is attached"):
        lora.extract(unet)
    assert len(lora.attach(unet, names, 4, seed=1)) == 16


def test_factors_check_their_shapes():
    down, up = torch.zeros(2, 8), torch.ones(6, 2)
    factors = LoraFactors(down + 1, up)
    assert factors.rank == 2 and torch.equal(factors.delta, torch.full((6, 8), 2.0))
    with pytest.raises(ValueError, match=r"got \[2, 8\] and \[6, 3\]"):
        LoraFactors(down, torch.ones(6, 3))
    with pytest.raises(ValueError, match="expected float32"):
        LoraFactors(down.half(), up)
