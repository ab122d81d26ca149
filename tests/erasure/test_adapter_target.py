"""Erasing to an adapter: the weights stay, quantized and offloaded ones too."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from edits import CLOSED, edited
from model_state import same, weights
from peft import LoraConfig
from tiny_erase import FAST
from tiny_families import denoise, flux, pixart_alpha, sd1, sd3, sdxl
from torch import nn

from realera_fast import Concept, Erasure
from realera_fast.erasure import applied, attached_to, attachment
from realera_fast.evaluation import verify
from realera_fast.models import (
    LoraFactors,
    base_hashes,
    components_of,
    dense_weight,
    projections,
    streams,
)
from realera_fast.solver import ConceptMap


def to_adapter(pipe: Any, **options: Any) -> Erasure:
    return edited(pipe, target="adapter", **options)


def made(model: nn.Module) -> Erasure:
    """An erasure of random factors, whatever the model's weights are packed in."""
    generator = torch.Generator().manual_seed(0)
    layers, kinds = projections(model, target="adapter"), streams(model)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * 0.1

    maps = {}
    for stream in dict.fromkeys(kinds.values()):
        width = min(layers[n].in_features for n, kind in kinds.items() if kind == stream)
        # Beside the pooled vector SDXL reads six sizes.
        beside = 6 * (getattr(model.config, "addition_time_embed_dim", None) or 0)
        width -= beside if stream == "pooled" else 0
        maps[stream] = ConceptMap(noise(width, 2), noise(2, width))
    lora = {
        n: LoraFactors(noise(2, maps["sequence"].width), noise(layer.out_features, 2))
        for n, layer in list(layers.items())[:3]
        if kinds[n] == "sequence"
    }
    provenance = {"base_hashes": base_hashes(model), "model_class": type(model).__name__}
    return Erasure(
        maps["sequence"],
        lora,
        (Concept("cat", "dog"),),
        {},
        provenance,
        {},
        pooled_map=maps.get("pooled"),
    )


def bare(model: nn.Module) -> dict[str, torch.Tensor]:
    """Tensors of a model by their names without an adapter, in the order of names."""
    kept = {n: t for n, t in weights(model).items() if ".lora_" not in n}
    return {n.replace(".base_layer", ""): kept[n] for n in sorted(kept)}


def is_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return list(one) == list(other) and all(torch.equal(t, other[n]) for n, t in one.items())


@pytest.mark.parametrize(
    ("build", "dtype"),
    [(sd1, torch.float32), (sd1, torch.bfloat16), (sdxl, torch.float32), (sd3, torch.float32)]
    + [(flux, torch.float32), (flux, torch.float16)],
)
def test_an_adapter_does_what_edited_weights_do(build, dtype):
    model, plain = (components_of(build(dtype=dtype)).model for _ in range(2))
    before, frozen = weights(model), {n: p.requires_grad for n, p in model.named_parameters()}
    erasure = made(model)
    assert erasure.apply_(model, target="adapter") is model and applied(model) == (erasure,)
    assert is_equal(bare(model), {n: before[n] for n in sorted(before)})
    erasure.apply_(plain)
    room = 8 * torch.finfo(dtype).eps
    for name, layer in projections(plain).items():
        x = torch.eye(layer.in_features, dtype=dtype)
        got, wanted = model.get_submodule(name)(x), layer(x)
        original = nn.functional.linear(x, before[f"{name}.weight"], layer.bias)
        # Of weights the sum is rounded, of an adapter its factors.
        error, moved = ((wanted - other).float().abs().max() for other in (got, original))
        assert error <= room * wanted.float().abs().max() and moved > 4 * error
    assert erasure.restore_(model) is model
    assert same(model, before) and applied(model) == ()
    assert {n: p.requires_grad for n, p in model.named_parameters()} == frozen


@pytest.mark.parametrize("build", [sd1, flux])
def test_erasing_to_an_adapter_is_the_same_erasure(build, tmp_path):
    pipe, other = build(), build()
    model = components_of(pipe).model
    before, original = weights(model), denoise(pipe)
    erasure, wanted = to_adapter(pipe), edited(other)
    assert erasure.provenance["target"] == "adapter"
    assert erasure.fingerprint == wanted.fingerprint
    for told in ("words", "layers", "warnings"):
        assert erasure.report[told] == wanted.report[told]
    assert is_equal(bare(model), {n: before[n] for n in sorted(before)})
    got, wanted = denoise(pipe), denoise(other)
    assert (got - wanted).norm() < 2e-3 * (wanted - original).norm()
    erasure.save(tmp_path / "delta.safetensors")
    assert 'target="adapter")' in (tmp_path / "delta.md").read_text(encoding="utf-8")


def test_factors_of_the_second_stage_are_part_of_the_adapter():
    pipe, plain = sd1(), sd1()
    before = weights(pipe.unet)
    erasure = to_adapter(pipe, config=replace(CLOSED, alignment=FAST))
    assert erasure.lora and is_equal(bare(pipe.unet), {n: before[n] for n in sorted(before)})
    original = denoise(plain)
    erasure.apply_(plain.unet)
    wanted = denoise(plain)
    assert (denoise(pipe) - wanted).norm() < 2e-3 * (wanted - original).norm()


@pytest.mark.parametrize("error", [RuntimeError("cut off"), KeyboardInterrupt()])
def test_a_failure_in_the_middle_leaves_no_adapter(monkeypatch, error):
    pipe = sd1()
    before, calls = weights(pipe.unet), []

    def settle(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise error

    monkeypatch.setattr(attachment, "_settle", settle)
    with pytest.raises(type(error)):
        made(pipe.unet).apply_(pipe.unet, target="adapter")
    assert same(pipe.unet, before) and attached_to(pipe.unet) is None
    assert projections(pipe.unet) and not getattr(pipe.unet, "peft_config", None)


def test_other_adapters_stand_beside_it_and_stay():
    pipe = sd1()
    erasure = made(pipe.unet)
    erasure.apply_(pipe.unet, target="adapter")
    with pytest.raises(ValueError, match="an adapter is attached"):
        to_adapter(pipe)
    pipe.unet.add_adapter(style(), adapter_name="style")
    pipe.set_adapters(["erasure", "style"])
    erasure.restore_(pipe.unet)
    assert set(pipe.unet.peft_config) == {"style"} and applied(pipe.unet) == ()
    pipe.unload_lora_weights()
    with pytest.raises(ValueError, match="was not applied to this model"):
        erasure.restore_(pipe.unet)


def style() -> LoraConfig:
    return LoraConfig(r=2, init_lora_weights=False, target_modules=["attn2.to_q", "attn2.to_k"])


def test_an_adapter_that_is_off_stays_off():
    pipe = sd1()
    before, erasure = denoise(pipe), made(pipe.unet)
    erasure.apply_(pipe.unet, target="adapter")
    pipe.unet.add_adapter(style(), adapter_name="style")
    pipe.set_adapters(["erasure"])
    erasure.restore_(pipe.unet)
    assert torch.equal(denoise(pipe), before)
    pipe.set_adapters(["style"])
    assert not torch.equal(denoise(pipe), before)


def test_what_was_unloaded_is_not_taken_for_it():
    pipe = sd1()
    before, erasure = weights(pipe.unet), made(pipe.unet)
    erasure.apply_(pipe.unet, target="adapter")
    pipe.unload_lora_weights()
    # Another adapter of that name is the user's.
    pipe.unet.add_adapter(style(), adapter_name="erasure")
    assert applied(pipe.unet) == ()
    with pytest.raises(ValueError, match="an adapter is attached"):
        erasure.restore_(pipe.unet)
    assert set(pipe.unet.peft_config) == {"erasure"}
    pipe.unload_lora_weights()
    erasure.apply_(pipe.unet)
    erasure.restore_(pipe.unet)
    assert same(pipe.unet, before)


def test_fused_it_can_not_be_taken_out():
    pipe = sd1()
    before, erasure = weights(pipe.unet), made(pipe.unet)
    erasure.apply_(pipe.unet, target="adapter")
    pipe.fuse_lora()
    for call in (lambda: erasure.restore_(pipe.unet), lambda: erasure.save_lora("nowhere")):
        with pytest.raises(ValueError, match=r"fused into the weights.*unfuse_lora"):
            call()
    pipe.unfuse_lora()
    erasure.restore_(pipe.unet)
    room = 1e-6
    assert all((t - before[n]).abs().max() <= room for n, t in weights(pipe.unet).items())


def test_verifying_refuses_what_it_would_not_judge_alone():
    pipe = sd1()
    erasure = made(pipe.unet)
    erasure.apply_(pipe.unet, target="adapter")
    sizes = {"steps": 1, "height": 16, "width": 16, "seeds": [0], "progress": False}
    pipe.disable_lora()
    with pytest.raises(ValueError, match="is switched off"):
        verify(pipe, erasure, ["a photo of a cat"], **sizes)
    pipe.enable_lora()
    pipe.unet.add_adapter(style(), adapter_name="style")
    with pytest.raises(ValueError, match=r"other adapters \(style\) stand beside"):
        verify(pipe, erasure, ["a photo of a cat"], **sizes)
    assert attached_to(pipe.unet) is erasure


def test_an_edit_of_weights_that_are_offloaded_since_is_seen_as_changed():
    pipe = sd1()
    edited(pipe)
    offloaded(pipe)
    with pytest.raises(ValueError, match="base model|weights"):
        made(sd1().unet).apply_(pipe.unet, target="adapter")


def test_a_model_without_adapters_and_another_target_are_refused():
    pipe = pixart_alpha()
    with pytest.raises(ValueError, match="a PixArtTransformer2DModel is none"):
        to_adapter(pipe)
    with pytest.raises(ValueError, match='expected "weights" or "adapter", got \'lora\''):
        edited(pipe, target="lora")
    unet = sd1().unet
    layer = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_v"
    parent = unet.get_submodule(layer.removesuffix(".to_v"))
    parent.to_v = torch.ao.nn.quantized.dynamic.Linear(16, 16)
    with pytest.raises(ValueError, match=rf"{layer} can't be read: it is a Linear with a weight"):
        projections(unet, target="adapter")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda u: u.enable_layerwise_casting(torch.bfloat16, torch.float32), "layerwise casting"),
        (
            lambda u: u.enable_group_offload(
                torch.device("cpu"), torch.device("cpu"), "leaf_level"
            ),
            "are offloaded",
        ),
        (lambda u: u.to("meta"), "is on the meta device"),
    ],
)
def test_states_that_an_adapter_does_not_fit_are_refused(change, message):
    pipe = sd1()
    change(pipe.unet)
    with pytest.raises(ValueError, match=message):
        to_adapter(pipe)


def test_verifying_takes_the_adapter_out_and_puts_it_back():
    pipe = sd1()
    erasure = made(pipe.unet)
    erasure.apply_(pipe.unet, target="adapter")
    sizes = {"steps": 1, "height": 16, "width": 16}
    shown = verify(pipe, erasure, ["a photo of a cat"], seeds=[0], progress=False, **sizes)
    assert shown.rows[0].text_change > 0.0 and attached_to(pipe.unet) is erasure
    assert shown.rows[0].before[0].tobytes() != shown.rows[0].after[0].tobytes()


# Offloaded module by module


def offloaded(pipe: Any) -> Any:
    cpu_offload(components_of(pipe).model, execution_device=torch.device("cpu"))
    return pipe


def test_offloaded_weights_are_read_where_they_rest():
    pipe, plain = offloaded(sd1()), sd1()
    with pytest.raises(ValueError, match='are offloaded.*target="adapter"'):
        edited(pipe)
    original = denoise(pipe)
    erasure = made(pipe.unet)
    erasure.apply_(pipe.unet, target="adapter")
    assert all(p.is_meta for n, p in pipe.unet.named_parameters() if ".lora_" not in n)
    erasure.apply_(plain.unet)
    change = (denoise(plain) - original).norm()
    assert (denoise(pipe) - denoise(plain)).norm() < 2e-3 * change
    erasure.restore_(pipe.unet)
    assert torch.equal(denoise(pipe), original)


def test_what_only_an_adapter_reaches_gets_the_closed_form_alone():
    pipe = offloaded(sd1())
    erasure = to_adapter(pipe, config=replace(CLOSED, alignment=FAST))
    told = [text for text in erasure.report["warnings"] if "has the closed form alone" in text]
    assert len(told) == 1 and "are offloaded" in told[0]
    assert erasure.fingerprint == edited(sd1()).fingerprint


# Really quantized, where the library is installed


def torchao(model: nn.Module) -> None:
    quantization = importlib.import_module("torchao.quantization")
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())


def replaced(model: nn.Module, make: Callable[[nn.Linear], nn.Module]) -> None:
    for name, layer in projections(model).items():
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, make(layer))


def bits(model: nn.Module, kind: str, **options: Any) -> None:
    library = importlib.import_module("bitsandbytes").nn

    def make(layer: nn.Linear) -> nn.Module:
        sizes, bias = (layer.in_features, layer.out_features), layer.bias is not None
        made = getattr(library, kind)(*sizes, bias=bias, **options)
        made.load_state_dict(layer.state_dict())
        return made.to("cpu")

    replaced(model, make)


def eight_bits(model: nn.Module) -> None:
    bits(model, "Linear8bitLt", has_fp16_weights=False)


def four_bits(model: nn.Module) -> None:
    bits(model, "Linear4bit", compute_dtype=torch.float32, quant_type="nf4")


def gguf(model: nn.Module) -> None:
    library, ours = (
        importlib.import_module(n) for n in ("gguf", "diffusers.quantizers.gguf.utils")
    )
    kind = library.GGMLQuantizationType.Q8_0

    def make(layer: nn.Linear) -> nn.Module:
        sizes, bias = (layer.in_features, layer.out_features), layer.bias is not None
        made = ours.GGUFLinear(*sizes, bias=bias, compute_dtype=torch.float32)
        packed = torch.tensor(library.quants.quantize(layer.weight.detach().numpy(), kind))
        made.weight, made.bias = ours.GGUFParameter(packed, quant_type=kind), layer.bias
        return made

    replaced(model, make)


LIBRARIES = {
    "torchao": (torchao, 1e-3),
    "bitsandbytes 8": (eight_bits, 0.1),
    "bitsandbytes 4": (four_bits, 1e-3),
    "gguf": (gguf, 1e-3),
}
"""How a model is quantized, and how far it is from itself dequantized, of what the edit does.

The 8 bits of bitsandbytes round what goes into a layer as well.
"""


def quantized(name: str) -> Any:
    pytest.importorskip(name.split(" ")[0])
    pipe = sd1()
    LIBRARIES[name][0](pipe.unet)
    return pipe


def dequantized(pipe: Any) -> Any:
    """The same model with ordinary weights."""
    plain = sd1()
    for name, module in plain.unet.named_modules():
        if isinstance(module, nn.Linear):
            dense = dense_weight(pipe.unet.get_submodule(name))
            module.weight.data = dense.to(module.weight.dtype, copy=True)
    return plain


@pytest.mark.parametrize("name", LIBRARIES)
def test_a_quantized_model_draws_as_its_dequantized_edit_does(name, tmp_path):
    pipe = quantized(name)
    plain = dequantized(pipe)
    with pytest.raises(ValueError, match='is quantized .* leave it as it is: target="adapter"'):
        edited(pipe)
    original = denoise(pipe)
    packed = {
        n: dense_weight(layer) for n, layer in projections(pipe.unet, target="adapter").items()
    }
    if name == "torchao":
        erasure = to_adapter(pipe)
    else:
        erasure = made(pipe.unet)
        erasure.apply_(pipe.unet, target="adapter")
    got = denoise(pipe)
    erasure.apply_(plain.unet)
    change = (got - original).norm()
    assert (got - denoise(plain)).norm() < LIBRARIES[name][1] * change and change > 1e-3
    again = quantized(name)
    loaded = Erasure.load(erasure.save(tmp_path / "delta.safetensors"))
    loaded.apply_(again.unet, target="adapter")
    assert torch.equal(denoise(again), got)
    stock = quantized(name)
    stock.load_lora_weights(erasure.save_lora(tmp_path / "lora").parent)
    assert torch.allclose(denoise(stock), got, atol=1e-5)
    loaded.restore_(pipe.unet)
    layers = projections(pipe.unet, target="adapter")
    assert all(torch.equal(dense_weight(layers[n]), weight) for n, weight in packed.items())
    assert torch.equal(denoise(pipe), original)


def test_a_quantized_text_encoder_is_read_as_it_is_called():
    pytest.importorskip("torchao")
    pipe = sd1()
    torchao(pipe.text_encoder)
    fingerprints = {to_adapter(pipe).fingerprint, edited(sd1()).fingerprint}
    assert len(fingerprints) == 2 and attached_to(pipe.unet) is not None
