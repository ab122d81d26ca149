"""Finding, identifying and guarding the projections that text enters a U-Net through."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from model_state import same, weights
from peft import LoraConfig
from tiny_models import tiny_unet
from torch import nn

from realera_fast.models import (
    base_hashes,
    check_width,
    projections,
    queries_and_outputs,
    transaction,
)

FIRST = "down_blocks.0.attentions.0.transformer_blocks.0.attn2"


def test_projections_are_the_key_and_value_maps_of_cross_attention():
    unet = tiny_unet()
    found = projections(unet)
    expected = [n for n, _ in unet.named_modules() if n.endswith(("attn2.to_k", "attn2.to_v"))]
    assert set(found) == set(expected) and len(found) == 8
    assert all(found[name] is unet.get_submodule(name) for name in found)
    check_width(unet, "sequence", 32)
    with pytest.raises(ValueError, match=r"width 31, but the model's .*to_k takes 32"):
        check_width(unet, "sequence", 31)


def test_projections_decide_the_output_for_a_text():
    unet = tiny_unet()
    latents, text = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 32)
    with torch.no_grad():
        assert not torch.equal(unet(latents, 1, text).sample, unet(latents, 1, 2 * text).sample)
        for layer in projections(unet).values():
            layer.weight.zero_()
        # With all of them gone, text has no way in any more: none was missed.
        assert torch.equal(unet(latents, 1, text).sample, unet(latents, 1, 2 * text).sample)


def test_a_compiled_model_has_the_names_of_its_module():
    unet = tiny_unet()
    assert list(projections(torch.compile(unet, backend="eager"))) == list(projections(unet))


def test_stable_diffusion_has_32_projections_and_needs_values():
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768)
    with pytest.raises(ValueError, match=r"attn2\.to_k\.weight is on the meta device"):
        projections(unet)
    for module in unet.modules():
        if isinstance(module, nn.Linear) and module.in_features == 768:
            module.to_empty(device="cpu")
            nn.init.zeros_(module.weight)
    found = projections(unet)
    assert len(found) == 32 and sum(m.out_features for m in found.values()) == 24_960


def test_weights_on_a_device_without_float64_are_refused(monkeypatch):
    unet = tiny_unet()
    # No such device is here: the CPU stands in for it.
    monkeypatch.setattr(
        "realera_fast.models.refusals.why_not_on", lambda device: f"no float64 on {device.type}"
    )
    for target in ("weights", "adapter"):
        with pytest.raises(ValueError, match=r"attn2\.to_k\.weight is on cpu: no float64 on cpu"):
            projections(unet, target=target)


def refused(match: str, unet: nn.Module) -> None:
    with pytest.raises(ValueError, match=match):
        projections(unet)


def test_refuses_what_is_no_model():
    with pytest.raises(TypeError, match=r"got SimpleNamespace; pass pipe\.unet"):
        projections(SimpleNamespace(unet=tiny_unet()))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="got str$"):
        projections("unet")  # type: ignore[arg-type]


def test_refuses_a_model_without_cross_attention():
    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
    )
    refused("UNet2DModel is not supported", unet)
    whole = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        mid_block_type=None,
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
    )
    refused("this UNet2DConditionModel has no cross-attention, so it takes no text", whole)


def test_refuses_text_through_added_projections():
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("SimpleCrossAttnDownBlock2D", "ResnetDownsampleBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("ResnetUpsampleBlock2D", "SimpleCrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=8,
        norm_num_groups=8,
    )
    refused("takes its text through add_k_proj", unet)


def test_refuses_text_that_is_transformed_first():
    unet = tiny_unet()
    unet.register_to_config(encoder_hid_dim_type="text_proj")
    refused("encoder_hid_dim_type='text_proj'", unet)
    unet.register_to_config(encoder_hid_dim_type="ip_image_proj")
    assert projections(unet)
    unet.get_submodule(FIRST).norm_cross = nn.LayerNorm(32)
    refused("cross_attention_norm", unet)


def test_refuses_fused_projections_until_unfused():
    unet = tiny_unet()
    unet.fuse_qkv_projections()
    refused(r"call unfuse_qkv_projections\(\) first", unet)
    unet.unfuse_qkv_projections()
    assert len(projections(unet)) == 8


class QuantizedParameter(nn.Parameter):
    """As bitsandbytes has it: a class of its own."""


class QuantizedTensor(torch.Tensor):
    """As torchao has it: a tensor subclass that claims an ordinary dtype."""


class FourBitLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(16, 16, dtype=torch.uint8), requires_grad=False)


@pytest.mark.parametrize("how", ["int8", "float8", "parameter", "tensor", "layer", "parametrized"])
def test_refuses_quantized_weights(how):
    unet = tiny_unet()
    attention = unet.get_submodule(FIRST)
    layer = attention.to_v
    weight = layer.weight.detach()
    if how in ("int8", "float8"):
        dtype = torch.int8 if how == "int8" else torch.float8_e4m3fn
        layer.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    elif how == "parameter":
        layer.weight = QuantizedParameter(weight)
    elif how == "tensor":
        layer.weight = nn.Parameter(weight.as_subclass(QuantizedTensor))
    elif how == "layer":
        attention.to_v = FourBitLayer()
    else:
        nn.utils.parametrizations.weight_norm(layer)
    refused(rf"{FIRST}\.to_v is quantized or not a plain linear layer", unet)


def test_refuses_offloaded_weights():
    from accelerate.hooks import AlignDevicesHook, SequentialHook, add_hook_to_module

    unet = tiny_unet()
    add_hook_to_module(unet.get_submodule(f"{FIRST}.to_k"), AlignDevicesHook("cpu"))
    assert projections(unet), "a hook that offloads nothing does no harm"
    for hook in (
        AlignDevicesHook("cpu", offload=True),
        SequentialHook(AlignDevicesHook("cpu", offload=True)),
    ):
        unet = tiny_unet()
        unet.get_submodule(f"{FIRST}.to_k")._hf_hook = hook
        refused("are offloaded", unet)


def test_refuses_group_offloading():
    unet = tiny_unet()
    unet.get_submodule("mid_block")._diffusers_hook = SimpleNamespace(hooks={"group_offloading": 1})
    refused("weights of mid_block are offloaded", unet)


def test_refuses_an_active_adapter_anywhere():
    unet = tiny_unet()
    unet.add_adapter(LoraConfig(r=2, target_modules=["attn1.to_q"]), adapter_name="pretty")
    refused(r"an adapter is attached \('pretty'\); unload it first \(pipe\.unload_lora", unet)
    del unet.peft_config
    refused(r"an adapter wraps .*attn1\.to_q", unet)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_refuses_weights_that_are_not_finite_and_names_the_layer(value):
    unet = tiny_unet()
    with torch.no_grad():
        unet.get_submodule(f"{FIRST}.to_v").weight[3, 5] = value
    refused(rf"{FIRST}\.to_v\.weight holds NaN or infinity; reload", unet)
    with torch.no_grad():
        unet.get_submodule(f"{FIRST}.to_k").weight[0, 0] = value
    refused(r"\(and 1 more projections\)", unet)


def test_refuses_mixed_widths_and_dtypes():
    unet = tiny_unet()
    unet.get_submodule(FIRST).to_k = nn.Linear(48, 16, bias=False)
    refused(r"share one text width, got .*48 \(", unet)
    unet = tiny_unet()
    unet.get_submodule(f"{FIRST}.to_k").to(torch.bfloat16)
    refused("share one dtype", unet)


def test_base_hashes_agree_after_loading_in_a_narrower_dtype():
    full = base_hashes(tiny_unet())
    assert list(full) == ["float32", "float16", "bfloat16"]
    assert len(set(full.values())) == 3
    for dtype in ("float16", "bfloat16"):
        narrow = base_hashes(tiny_unet(dtype=getattr(torch, dtype)))
        assert narrow == {dtype: full[dtype]}


def test_base_hashes_see_every_value_shape_and_name():
    seen = {base_hashes(tiny_unet())["float32"], base_hashes(tiny_unet(seed=7))["float32"]}
    assert len(seen) == 2 and base_hashes(tiny_unet())["float32"] in seen
    for name, layer in projections(tiny_unet()).items():
        unet = tiny_unet()
        weight = unet.get_submodule(name).weight
        with torch.no_grad():
            weight[-1, -1] = torch.nextafter(weight[-1, -1], torch.tensor(9.0))
        assert base_hashes(unet)["float32"] not in seen, name
        assert layer.weight.shape == weight.shape
    unet = tiny_unet()
    with torch.no_grad():
        unet.conv_in.weight.zero_()
    assert base_hashes(unet)["float32"] in seen, "other weights don't count"


def test_base_hashes_ignore_strides():
    unet = tiny_unet()
    layer = unet.get_submodule(f"{FIRST}.to_k")
    expected = base_hashes(unet)
    layer.weight = nn.Parameter(layer.weight.detach().t().contiguous().t())
    assert not layer.weight.is_contiguous() and base_hashes(unet) == expected


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, SystemExit, MemoryError])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_transaction_restores_after_any_exception(error, dtype):
    unet = tiny_unet(dtype=dtype)
    unet.train()
    unet.mid_block.eval()
    unet.conv_in.requires_grad_(False)
    before = weights(unet)
    layers = projections(unet)
    flags = [(m.training) for m in unet.modules()], [p.requires_grad for p in unet.parameters()]
    places = {n: (id(m.weight), m.weight.data_ptr()) for n, m in layers.items()}
    names = list(layers)
    with pytest.raises(error), transaction(unet):
        with torch.no_grad():
            layers[names[0]].weight.mul_(2)
            layers[names[2]].weight.fill_(float("nan"))
        layers[names[1]].weight.data = torch.zeros_like(layers[names[1]].weight)
        layers[names[3]].weight = nn.Parameter(torch.zeros(1, dtype=dtype))
        unet.eval().requires_grad_(False)
        raise error("stop")
    assert same(unet, before)
    assert {n: (id(m.weight), m.weight.data_ptr()) for n, m in layers.items()} == places
    assert flags == (
        [(m.training) for m in unet.modules()],
        [p.requires_grad for p in unet.parameters()],
    )


def test_transaction_takes_out_a_left_over_adapter():
    unet = tiny_unet()
    before, modules = weights(unet), dict(unet.named_modules())
    with pytest.raises(KeyboardInterrupt), transaction(unet):
        unet.add_adapter(LoraConfig(r=2, target_modules=["attn2.to_k", "attn2.to_v"]))
        assert len(dict(unet.named_modules())) > len(modules)
        raise KeyboardInterrupt
    assert dict(unet.named_modules()) == modules
    assert same(unet, before)
    assert not getattr(unet, "peft_config", None) and projections(unet)


def test_transaction_survives_a_second_interrupt_while_restoring(monkeypatch):
    unet = tiny_unet()
    before = weights(unet)
    original, calls = torch.Tensor.copy_, []

    def interrupted(self, *args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(self, *args)

    with pytest.raises(RuntimeError, match="first"), transaction(unet):
        with torch.no_grad():
            for layer in projections(unet).values():
                layer.weight.zero_()
        monkeypatch.setattr(torch.Tensor, "copy_", interrupted)
        raise RuntimeError("first")
    monkeypatch.undo()
    assert len(calls) == 3 + 8
    assert same(unet, before)


def test_transaction_keeps_what_succeeded():
    unet = tiny_unet()
    layer = unet.get_submodule(f"{FIRST}.to_k")
    with transaction(unet), torch.no_grad():
        layer.weight.zero_()
    assert not layer.weight.any()


# Queries and outputs


def test_queries_and_outputs_are_found_and_checked():
    unet = tiny_unet()
    found = queries_and_outputs(unet)
    leaves = {name.split("attn2.")[1] for name in found}
    assert leaves == {"to_q", "to_out.0"} and len(found) == 8
    assert not set(found) & set(projections(unet))
    name = next(iter(found))
    for spoil, message in (
        (lambda u: u.get_submodule(name).weight.data.fill_(float("nan")), "holds NaN"),
        (lambda u: u.get_submodule(name).double(), "share one dtype"),
        (lambda u: setattr(u.get_submodule(name.removesuffix(".to_q")), "to_out", None), "to_out"),
    ):
        spoiled = tiny_unet()
        spoil(spoiled)
        with pytest.raises(ValueError, match=message):
            queries_and_outputs(spoiled)


def test_a_transaction_guards_the_layers_it_is_given():
    unet = tiny_unet()
    layers = queries_and_outputs(unet)
    before = {name: layer.weight.detach().clone() for name, layer in layers.items()}
    with pytest.raises(RuntimeError), transaction(unet, layers):
        for layer in layers.values():
            layer.weight.data.mul_(2)
        raise RuntimeError
    assert all(torch.equal(layer.weight, before[name]) for name, layer in layers.items())
