"""What other programs load: adapters, edited tensors, single-file checkpoints, whole models."""

from __future__ import annotations

import json
import os
import re

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from edits import CLOSED, edited
from ldm_checkpoint import to_ldm
from model_state import weights
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from stock_prompts import encoded
from tiny_families import FAMILIES, denoise, flux, pixart_sigma, sd1, sdxl
from tiny_models import aligned, tiny_unet

from realera_fast import Concept, Erasure, erase
from realera_fast.erasure import BaseModelMismatchError
from realera_fast.models import LoraFactors, base_hashes, components_of, projections
from realera_fast.runtime import SafetensorsFileError, patch, read_header, tensor_bytes
from realera_fast.runtime.files import MARKER
from realera_fast.solver import ConceptMap

ADAPTERS = [name for name in FAMILIES if not name.startswith(("pixart", "refiner"))]


def close(got, expected, original) -> bool:
    """Equal but for rounding, seen against what the edit does."""
    return bool((got - expected).norm() < 2e-3 * (expected - original).norm())


def random_erasure(model, seed: int = 0) -> Erasure:
    """A small erasure of a U-Net with adapters, without any text encoder."""
    generator = torch.Generator().manual_seed(seed)
    layers = projections(model)
    width = next(iter(layers.values())).in_features

    def noise(*shape):
        return torch.randn(shape, generator=generator) * 0.1

    return Erasure(
        ConceptMap(noise(width, 2), noise(2, width)),
        {
            n: LoraFactors(noise(2, width), noise(layer.out_features, 2))
            for n, layer in list(layers.items())[:3]
        },
        (Concept("cat", "dog"),),
        {},
        {"base_hashes": base_hashes(model), "model_class": type(model).__name__, "seed": seed},
        {"solve": {"residual_ratio": 0.5}},
    )


# Adapters


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
@pytest.mark.parametrize("name", ADAPTERS)
def test_stock_pipelines_load_the_adapter_and_it_is_the_edit(tmp_path, name, layout):
    pipe, other = FAMILIES[name](), FAMILIES[name]()
    original = denoise(other)
    model = components_of(pipe).model
    erasure = edited(pipe)
    if layout == "kohya" and name not in ("sd1", "sd2", "sdxl", "flux"):
        with pytest.raises(ValueError, match="use layout='diffusers'"):
            erasure.save_lora(tmp_path, model, layout=layout)
        return
    file = erasure.save_lora(tmp_path, model, layout=layout)
    if (name, layout) == ("flux", "kohya"):
        # Diffusers knows these names and then looks for them under a prefix that it left out.
        found = type(pipe).lora_state_dict(tmp_path, weight_name=file.name)
        before = weights(components_of(other).model)
        for key, tensor in weights(model).items():
            down = found.get(key.replace(".weight", ".lora_A.weight"))
            if down is not None:
                change = found[key.replace(".weight", ".lora_B.weight")] @ down
                assert torch.allclose(before[key] + change, tensor, rtol=1e-4, atol=1e-5)
        assert len(found) == 4
        return
    other.load_lora_weights(tmp_path, weight_name=file.name, adapter_name="erased")
    assert close(denoise(other), denoise(pipe), original)
    # Every key was taken: what is loaded and fused is the edited model.
    other.fuse_lora()
    other.unload_lora_weights()
    after, fused = weights(model), weights(components_of(other).model)
    before = weights(components_of(FAMILIES[name]()).model)
    for key, tensor in after.items():
        assert torch.allclose(fused[key], tensor, rtol=1e-4, atol=1e-5), key
        assert torch.equal(before[key], tensor) == torch.equal(before[key], fused[key]), key


def test_kohya_names_are_those_of_its_scripts(tmp_path):
    pipe = sdxl()
    erasure = edited(pipe)
    keys = set(load_file(erasure.save_lora(tmp_path, pipe.unet, layout="kohya")))
    parts = {key.split(".")[0] for key in keys}
    # One resnet a block in the tiny model: two entries a block, the first one is the convolution.
    # The fourth number counts inside the transformer.
    assert {
        "lora_unet_label_emb_0_0",
        "lora_unet_input_blocks_3_1_transformer_blocks_1_attn2_to_k",
        "lora_unet_middle_block_1_transformer_blocks_0_attn2_to_v",
        "lora_unet_output_blocks_1_1_transformer_blocks_0_attn2_to_k",
    } <= parts
    assert {key.split(".", 1)[1] for key in keys} == {
        "lora_down.weight",
        "lora_up.weight",
        "alpha",
    }
    found = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    for part in parts:
        assert float(found[f"{part}.alpha"]) == found[f"{part}.lora_down.weight"].shape[0]
    pipe = flux()
    parts = {
        key.split(".")[0]
        for key in load_file(
            edited(pipe).save_lora(tmp_path / "flux", pipe.transformer, layout="kohya")
        )
    }
    assert parts == {"lora_unet_txt_in", "lora_unet_vector_in_in_layer"}


def test_adapters_are_weighted_together_and_swapped_in_place(tmp_path):
    files = []
    for number, concept in enumerate(("cat=dog", "ship=tree")):
        pipe = sd1()
        erasure = erase(pipe, [concept], config=CLOSED, progress=False)
        files.append(erasure.save_lora(tmp_path / str(number), pipe.unet))
    base = sd1()
    original = weights(base.unet)
    deltas = []
    for file in files:
        tensors = load_file(file)
        deltas.append(
            {
                key[5:-14]: tensors[key.replace("lora_A", "lora_B")] @ tensors[key]
                for key in tensors
                if "lora_A" in key
            }
        )
    for number, file in enumerate(files):
        base.load_lora_weights(file.parent, weight_name=file.name, adapter_name=f"a{number}")
    base.set_adapters(["a0", "a1"], adapter_weights=[1.0, 0.5])
    base.fuse_lora()
    base.unload_lora_weights()
    for name in deltas[0]:
        expected = original[f"{name}.weight"] + deltas[0][name] + 0.5 * deltas[1][name]
        assert torch.allclose(base.unet.state_dict()[f"{name}.weight"], expected, atol=1e-5)

    swapped, expected = sd1(), sd1()
    swapped.enable_lora_hotswap(target_rank=64)
    swapped.load_lora_weights(files[0].parent, weight_name=files[0].name, adapter_name="x")
    first = denoise(swapped)
    swapped.load_lora_weights(
        files[1].parent, weight_name=files[1].name, adapter_name="x", hotswap=True
    )
    expected.load_lora_weights(files[1].parent, weight_name=files[1].name)
    assert torch.allclose(denoise(swapped), denoise(expected), rtol=1e-3, atol=1e-2)
    assert not torch.allclose(first, denoise(swapped), rtol=1e-3, atol=1e-2)


def test_a_family_without_adapters_says_what_else_there_is(tmp_path):
    pipe = pixart_sigma()
    with pytest.raises(ValueError, match=r"loads no adapters for it; use save .*save_weights"):
        edited(pipe).save_lora(tmp_path, pipe.transformer)
    assert os.listdir(tmp_path) == []


def test_layouts_are_checked(tmp_path):
    unet = tiny_unet()
    erasure = random_erasure(unet)
    with pytest.raises(ValueError, match="layout: expected 'diffusers' or 'kohya', got 'a1111'"):
        erasure.save_lora(tmp_path, unet, layout="a1111")  # type: ignore[arg-type]
    erasure.apply_(unet)
    with pytest.raises(ValueError, match="model: pass it"):
        erasure.save_lora(tmp_path, layout="kohya")


# Edited tensors and whole models


@pytest.mark.parametrize("name", FAMILIES)
def test_edited_tensors_make_the_edited_model_of_a_base(tmp_path, name):
    pipe, other = FAMILIES[name](), FAMILIES[name]()
    model, base = components_of(pipe).model, components_of(other).model
    erasure = edited(pipe)
    file = erasure.save_weights(tmp_path / "edited.safetensors", model)
    tensors = load_file(file)
    missing = base.load_state_dict(tensors, strict=False)
    assert not missing.unexpected_keys
    assert all(torch.equal(t, base.state_dict()[n]) for n, t in weights(model).items())
    assert len(tensors) == len(projections(model))


@pytest.mark.parametrize("name", FAMILIES)
def test_the_whole_model_loads_with_stock_diffusers(tmp_path, name):
    pipe, other = FAMILIES[name](), FAMILIES[name]()
    model, base = components_of(pipe).model, components_of(other).model
    erasure = edited(pipe)
    folder = erasure.save_pretrained(tmp_path / "model", model)
    loaded = type(model).from_pretrained(folder, use_safetensors=True)
    assert all(torch.equal(t, loaded.state_dict()[n]) for n, t in weights(model).items())
    marker = json.loads((folder / MARKER).read_text())["files"]
    assert set(marker) == {p.name for p in folder.iterdir()} - {MARKER}
    with safe_open(folder / "diffusion_pytorch_model.safetensors", framework="pt") as opened:
        assert json.loads(opened.metadata()["realera_fast.concepts"])[0]["target"] == "cat"
    with pytest.raises(ValueError, match="not what was applied to it last"):
        erasure.save_pretrained(tmp_path / "other", base)
    with pytest.raises(FileExistsError, match="is not empty"):
        erasure.save_pretrained(folder, model)
    assert sorted(os.listdir(tmp_path)) == ["model"]


def test_a_saved_pipeline_is_the_edited_one(tmp_path):
    pipe = sdxl()
    edited(pipe)
    pipe.save_pretrained(tmp_path / "pipe")
    loaded = type(pipe).from_pretrained(tmp_path / "pipe")
    parts = {n: part for n, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    assert {"unet", "vae", "text_encoder", "text_encoder_2"} == set(parts)
    for name, part in parts.items():
        after = loaded.components[name].state_dict()
        assert after.keys() == part.state_dict().keys()
        assert all(torch.equal(after[key], tensor) for key, tensor in weights(part).items()), name
    assert torch.equal(denoise(aligned(loaded)), denoise(pipe))


# Single-file checkpoints


@pytest.mark.parametrize("stored", [torch.float32, torch.float16])
def test_a_single_file_comes_in_and_goes_out(tmp_path, stored):
    unet = tiny_unet(dtype=stored)
    unet.save_config(tmp_path / "config")
    extra = {"first_stage_model.decoder.x": torch.arange(7.0), "empty": torch.zeros(0, 3)}
    tensors = {k: v.contiguous() for k, v in to_ldm(unet).items()} | extra
    save_file(tensors, tmp_path / "base.safetensors", {"format": "pt", "title": "mine"})
    loaded = UNet2DConditionModel.from_single_file(
        str(tmp_path / "base.safetensors"), config=str(tmp_path / "config"), dtype=torch.float32
    )
    assert all(torch.equal(t.float(), loaded.state_dict()[n]) for n, t in weights(unet).items())
    erasure = random_erasure(loaded)
    out = erasure.save_single_file(
        tmp_path / "edited.safetensors", tmp_path / "base.safetensors", loaded
    )
    again = UNet2DConditionModel.from_single_file(
        str(out), config=str(tmp_path / "config"), dtype=torch.float32
    )
    erasure.apply_(loaded)
    for name, tensor in weights(loaded).items():
        rounded = tensor.to(stored).float()
        assert torch.allclose(again.state_dict()[name], rounded, rtol=2e-3, atol=1e-6), name
        if stored == torch.float32:
            assert torch.equal(again.state_dict()[name], tensor), name
    # All else is as it was, to the byte; the metadata grew.
    before, after = load_file(tmp_path / "base.safetensors"), load_file(out)
    assert list(read_header(out).entries) == list(
        read_header(tmp_path / "base.safetensors").entries
    )
    changed = {k for k in before if not torch.equal(before[k], after[k])}
    assert len(changed) == len(projections(loaded))
    assert all(key.endswith((".to_k.weight", ".to_v.weight")) for key in changed)
    assert read_header(out).metadata["title"] == "mine"
    assert "realera_fast.concepts" in read_header(out).metadata
    # From the edited model too, whose original weights are remembered.
    same = erasure.save_single_file(tmp_path / "b.safetensors", tmp_path / "base.safetensors")
    assert same.read_bytes() == out.read_bytes()


def test_a_single_file_of_another_model_is_refused(tmp_path):
    unet = tiny_unet()
    erasure = random_erasure(unet)
    base = tmp_path / "base.safetensors"
    save_file({k: v.contiguous() for k, v in to_ldm(tiny_unet(seed=5)).items()}, base)
    with pytest.raises(BaseModelMismatchError, match="does not hold the weight of"):
        erasure.save_single_file(tmp_path / "out.safetensors", base, unet)
    with pytest.raises(ValueError, match="is the checkpoint itself"):
        erasure.save_single_file(base, base, unet)
    (tmp_path / "junk.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(SafetensorsFileError, match="not a safetensors file"):
        erasure.save_single_file(tmp_path / "out", tmp_path / "junk.safetensors", unet)
    assert sorted(os.listdir(tmp_path)) == ["base.safetensors", "junk.safetensors"]


def test_a_weight_that_two_layers_share_is_no_guess(tmp_path):
    unet = tiny_unet()
    layers = list(projections(unet).items())
    (first, one), (_, two) = [pair for pair in layers if pair[1].out_features == 16][:2]
    with torch.no_grad():
        two.weight.copy_(one.weight)
    base = tmp_path / "base.safetensors"
    save_file({k: v.contiguous() for k, v in to_ldm(unet).items()}, base)
    erasure = random_erasure(unet)
    assert first in erasure.lora
    with pytest.raises(ValueError, match="of several layers that are edited differently"):
        erasure.save_single_file(tmp_path / "out.safetensors", base, unet)


# Files


def test_a_patched_file_differs_where_it_was_told_to(tmp_path):
    source = tmp_path / "a.safetensors"
    tensors = {
        f"t{i}": torch.randn(3, i, generator=torch.Generator().manual_seed(i)) for i in range(5)
    }
    tensors["half"] = torch.ones(2, dtype=torch.bfloat16)
    tensors["bytes"] = torch.arange(5, dtype=torch.uint8)
    save_file(tensors, source, {"a": "1"})
    new = {"t3": torch.zeros(3, 3), "half": torch.zeros(2, dtype=torch.bfloat16)}
    target = patch(source, tmp_path / "b.safetensors", new, {"b": "2"})
    found = load_file(target)
    assert list(found) == list(load_file(source))
    for name, tensor in (tensors | new).items():
        assert torch.equal(found[name], tensor), name
    assert read_header(target).metadata == {"a": "1", "b": "2"}
    # In place, too.
    patch(source, source, new, {})
    assert torch.equal(load_file(source)["t3"], new["t3"])
    with pytest.raises(ValueError, match=r"t1: expected F32 \[3, 1\]"):
        patch(source, target, {"t1": torch.zeros(1)}, {})


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x01",
        b"\xff" * 64,
        (2).to_bytes(8, "little") + b"[]",
        (52).to_bytes(8, "little") + b'{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,36]}}',
        (12).to_bytes(8, "little") + b'{"a": [1,2]}',
        (26).to_bytes(8, "little") + b'{"__metadata__": {"a": 1}}',
        (9).to_bytes(8, "little") + b'{"a":{}}}',
    ],
)
def test_hostile_headers_are_refused(tmp_path, data):
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    with pytest.raises(SafetensorsFileError):
        read_header(path)


def test_a_tensors_bytes_are_its_values():
    tensor = torch.arange(6, dtype=torch.float16).view(2, 3).mT
    assert bytes(tensor_bytes(tensor)) == tensor.contiguous().numpy().tobytes()


def test_every_file_says_what_was_erased(tmp_path):
    unet = tiny_unet()
    erasure = random_erasure(unet)
    erasure.apply_(unet)
    files = [
        erasure.save_lora(tmp_path / "lora", unet),
        erasure.save_lora(tmp_path / "kohya.safetensors", unet, layout="kohya"),
        erasure.save_weights(tmp_path / "weights.safetensors", unet),
    ]
    for file in files:
        with safe_open(file, framework="pt") as opened:
            found = {
                key.removeprefix("realera_fast."): json.loads(value)
                for key, value in opened.metadata().items()
                if key.startswith("realera_fast.")
            }
        assert found["concepts"] == [Concept("cat", "dog").to_dict()]
        assert found["provenance"]["base_hashes"] == erasure.provenance["base_hashes"]
        assert found["provenance"]["seed"] == 0 and found["solve"] == {"residual_ratio": 0.5}
        assert re.fullmatch("[0-9a-f]{64}", found["report_sha256"])
        own = file.name == "pytorch_lora_weights.safetensors"
        card = (file.parent / "README.md" if own else file.with_suffix(".md")).read_text()
        assert card.startswith("---\n") and "library_name: diffusers" in card
        assert "| cat |" in card and file.name in card


def test_a_card_is_plain_text_whatever_a_concept_is_called(tmp_path):
    from realera_fast.erasure.model_card import write_card

    erasure = random_erasure(tiny_unet())
    hostile = Erasure(
        erasure.map,
        {},
        (Concept("<script>alert(1)</script> | [x](y)", "`dog`\n# h"),),
        {},
        erasure.provenance,
        {"warnings": ["![i](http://x)"]},
    )
    path = tmp_path / "a.safetensors"
    path.touch()
    text = write_card(path, hostile, use="weights", component="unet").read_text()
    assert "<script" not in text and "](y)" not in text and "](http" not in text
    (row,) = [line for line in text.splitlines() if "script" in line and line[0] == "|"]
    assert row.count("|") == 6
    assert str(tmp_path) not in text, "a card says nothing of the machine"


# No weights at all


def test_prompt_maps_compose_and_refuse_alignment():
    pipe = sd1()
    first = erase(pipe, ["cat=dog"], config=CLOSED, progress=False)
    second = erase(pipe, ["ship=tree"], config=CLOSED, progress=False)
    both = first.prompt_map().compose(second.prompt_map())
    picture = denoise(pipe)
    base = sd1()
    original = denoise(base)
    stock = encoded(base, ["a photo of a cat"])
    mapped = {name: both(embeds) for name, embeds in stock.items()}
    assert close(denoise(base, **mapped), picture, original)
    # A module: it moves, and its factors are no parameters.
    assert not list(both.parameters()) and len(both.state_dict()) == 2
    assert both.to(torch.float64).sequence.left.dtype == torch.float64
    with pytest.raises(ValueError, match="does not take a pooled vector"):
        both(stock["prompt_embeds"], torch.zeros(1, 4))
    with pytest.raises(ValueError, match="takes a pooled vector; pass both"):
        edited(flux()).prompt_map()(torch.zeros(1, 2, 48))
    with pytest.raises(ValueError, match="for the same model"):
        both.compose(edited(flux()).prompt_map())
    with pytest.raises(ValueError, match="factors that act layer by layer"):
        random_erasure(tiny_unet()).prompt_map()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_prompt_map_is_the_edit_within_the_error_of_the_dtype(dtype):
    erasure = edited(sd1())
    unet = tiny_unet()
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(3))
    for name, layer in projections(unet).items():
        weight = layer.weight.detach().to(dtype)
        exact = weight.double() @ erasure.map.matrix.double() @ x.to(dtype).double().mT
        through_weights = (
            erasure.edited_weights({name: weight})[name].float() @ x.to(dtype).mT.float()
        )
        through_prompt = weight.float() @ erasure.prompt_map()(x.to(dtype)).float().mT
        errors = [(got.double() - exact).norm() for got in (through_weights, through_prompt)]
        assert errors[1] < 2 * errors[0] + 1e-6 * exact.norm()
        assert errors[0] < 2 * torch.finfo(dtype).eps * weight.norm() * x.norm() * 4
    assert isinstance(sd1(), StableDiffusionPipeline)
