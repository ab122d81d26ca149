"""The attention processor computes what diffusers' own does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import tiny_unet
from torch import Tensor

from realera_fast.unet import attention


class Own:
    """A projector that asks the layer itself."""

    def keys_values(self, layer: str, attn: Any, states: Tensor) -> tuple[Tensor, Tensor]:
        return attn.to_k(states), attn.to_v(states)

    def query(self, layer: str, attn: Any, hidden: Tensor) -> Tensor:
        return attn.to_q(hidden)

    def output(self, layer: str, attn: Any, hidden: Tensor) -> Tensor:
        return attn.to_out[0](hidden)


def inputs(dtype=torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        "sample": torch.randn(2, 4, 8, 8, generator=generator).to(dtype),
        "timestep": torch.tensor([5, 900]),
        "encoder_hidden_states": torch.randn(2, 7, 32, generator=generator).to(dtype),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
def test_output_is_that_of_diffusers_to_the_bit(dtype, masked):
    unet = tiny_unet(dtype=dtype)
    values: dict[str, Any] = inputs(dtype)
    if masked:
        values["encoder_attention_mask"] = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    with torch.no_grad():
        before = unet(**values).sample
        former = attention.install(unet, Own())
        assert torch.equal(unet(**values).sample, before)
    attention.reinstate(unet, former)
    names = {name.removesuffix(".processor") for name in unet.attn_processors}
    assert set(former) <= names and len(former) == 4
    assert all(unet.get_submodule(name).processor is p for name, p in former.items())


def test_an_interrupt_between_two_layers_leaves_none_behind(monkeypatch):
    unet = tiny_unet()
    former = unet.attn_processors
    count, make = 0, attention.TextAttnProcessor

    def interrupted(*arguments):
        nonlocal count
        count += 1
        if count == 3:
            raise KeyboardInterrupt
        return make(*arguments)

    monkeypatch.setattr(attention, "TextAttnProcessor", interrupted)
    with pytest.raises(KeyboardInterrupt):
        attention.install(unet, Own())
    assert all(p is former[name] for name, p in unet.attn_processors.items())


def test_gradients_are_those_of_diffusers_also_recomputed():
    found = []
    for own, recomputed in ((False, False), (True, False), (True, True)):
        unet = tiny_unet()
        if own:
            attention.install(unet, Own())
        if recomputed:
            unet.enable_gradient_checkpointing()
        unet(**inputs()).sample.square().mean().backward()
        found.append([p.grad for p in unet.parameters()])
    for others in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], others, strict=True))


def test_it_compiles_without_a_break():
    unet = tiny_unet()
    attention.install(unet, Own())
    with torch.no_grad():
        wanted = unet(**inputs()).sample
        compiled = torch.compile(unet, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(**inputs()).sample, wanted)
        # A compiled wrapper is looked through.
        assert attention.layers(compiled).keys() == attention.layers(unet).keys()


class Custom:
    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        return hidden_states


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda u: u.set_attn_processor(Custom()), "runs the attention processor Custom"),
        (lambda u: u.fuse_qkv_projections(), "unfuse_qkv_projections"),
        (lambda u: setattr(first(u), "norm_q", torch.nn.Identity()), "has a norm_q"),
        (lambda u: setattr(first(u), "residual_connection", True), "residual connection"),
        (
            lambda u: [
                setattr(a, "is_cross_attention", False) for a in attention.layers(u).values()
            ],
            "no cross-attention",
        ),
    ],
)
def test_what_can_not_be_stood_in_for_is_refused(spoil, message):
    unet = tiny_unet()
    spoil(unet)
    before = dict(unet.attn_processors)
    with pytest.raises(ValueError, match=f"model: .*{message}"):
        attention.install(unet, Own())
    assert unet.attn_processors == before


def first(unet) -> Any:
    return next(iter(attention.layers(unet).values()))
