"""Erasures in ComfyUI: its patcher, its conditioning and the nodes, with stand-ins for both."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from comfyui_types import Patcher, in_comfyui, load_lora
from edits import edited
from ldm_checkpoint import to_ldm
from safetensors.torch import load_file
from tiny_families import flux, sd1, sdxl

from realera_fast import Concept, Erasure
from realera_fast.erasure import (
    BaseModelMismatchError,
    comfyui_conditioning,
    comfyui_model,
)
from realera_fast.models import LoraFactors, base_hashes, projections
from realera_fast.solver import ConceptMap

ROOT = Path(__file__).parents[2]


def random_erasure(unet: torch.nn.Module) -> Erasure:
    """A map of the text, and factors of some layers beside it."""

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape) * 0.1

    layers = projections(unet)
    width = next(iter(layers.values())).in_features
    lora = {
        name: LoraFactors(noise(2, width), noise(layer.out_features, 2))
        for name, layer in list(layers.items())[1::3]
    }
    return Erasure(
        ConceptMap(noise(width, 2), noise(2, width)),
        lora,
        (Concept("cat", "dog"),),
        {},
        {"base_hashes": base_hashes(unet), "model_class": type(unet).__name__},
        {},
    )


@pytest.fixture(scope="module")
def erased() -> tuple[Patcher, Patcher, Erasure, torch.nn.Module]:
    """An SDXL in ComfyUI before and after an erasure, the erasure, and the U-Net before."""
    pipe, before = sdxl(), sdxl()
    erasure = edited(pipe)
    return in_comfyui(to_ldm(before.unet)), in_comfyui(to_ldm(pipe.unet)), erasure, before.unet


def same(got: torch.Tensor, expected: torch.Tensor, before: torch.Tensor) -> bool:
    """Equal but for rounding, seen against what the edit does."""
    change = (expected.float() - before.float()).norm()
    return bool((got.float() - expected.float()).norm() <= 2e-3 * change)


@pytest.mark.parametrize(("name", "pairs"), [("sd1", True), ("sd1", False), ("sdxl", True)])
def test_a_u_net_gets_the_weights_of_the_edit(name: str, pairs: bool, erased: Any) -> None:
    if name == "sdxl":
        patcher, edited_one, erasure, _ = erased
    else:
        unet = sd1().unet
        patcher, erasure = in_comfyui(to_ldm(unet)), random_erasure(unet)
        edited_one = in_comfyui(to_ldm(erasure.apply_(unet)))
    patcher.pairs = pairs
    before, expected = dict(patcher.weights), edited_one.weights
    clone = comfyui_model(patcher, erasure, load_lora)
    after = clone.patched()
    changed = {key for key in after if not torch.equal(after[key], before[key])}
    assert changed == {key for key in expected if not torch.equal(expected[key], before[key])}
    assert len(changed) > 4 and any("label_emb" in key for key in changed) == (name == "sdxl")
    assert all(same(after[key], expected[key], before[key]) for key in changed)
    # The model that came in is as it was, and other patches stay.
    assert not patcher.patches
    twice = comfyui_model(clone, erasure, load_lora, strength=0.5)
    assert {len(patches) for patches in twice.patches.values()} == {2}
    key = min(changed)
    half = before[key] + 1.5 * (after[key] - before[key])
    assert torch.allclose(twice.patched()[key], half, atol=1e-5)


def test_flux_has_names_of_its_own() -> None:
    pipe = flux()
    names = {
        "diffusion_model.txt_in.weight": "context_embedder",
        "diffusion_model.vector_in.in_layer.weight": "time_text_embed.text_embedder.linear_1",
    }
    layers = projections(pipe.transformer)
    before = {key: layers[name].weight.detach().clone() for key, name in names.items()}
    erasure = edited(pipe)
    clone = comfyui_model(Patcher(before), erasure, load_lora)
    after = clone.patched()
    for key, name in names.items():
        assert same(after[key], layers[name].weight.detach(), before[key])


def test_half_precision_is_recognized_and_other_weights_are_not() -> None:
    pipe = sd1()
    weights = to_ldm(pipe.unet)
    erasure = random_erasure(pipe.unet)
    assert comfyui_model(in_comfyui(weights, torch.float16), erasure, load_lora).patches
    other = in_comfyui(to_ldm(sd1(seed=7).unet))
    with pytest.raises(BaseModelMismatchError, match="not those that the erasure was made for"):
        comfyui_model(other, erasure, load_lora)
    half = sd1(dtype=torch.bfloat16).unet
    with pytest.raises(
        BaseModelMismatchError, match="weights in bfloat16, which can't be compared"
    ):
        comfyui_model(in_comfyui(weights, torch.float16), random_erasure(half), load_lora)
    with pytest.raises(BaseModelMismatchError, match="no layer of it is known to read text"):
        comfyui_model(Patcher({"diffusion_model.x.weight": torch.zeros(2, 2)}), erasure, load_lora)


def test_what_comfyui_leaves_out_is_said() -> None:
    pipe = sd1()
    patcher = in_comfyui(to_ldm(pipe.unet))

    def forgetful(tensors, keys):  # type: ignore[no-untyped-def]
        return dict(list(load_lora(tensors, keys).items())[1:])

    with pytest.raises(RuntimeError, match=r"took no patch for diffusion_model.*\(1 of \d+"):
        comfyui_model(patcher, random_erasure(pipe.unet), forgetful)


def test_a_conditioning_is_mapped_as_the_weights_are(erased: Any) -> None:
    erasure = erased[2]
    mapping = erasure.prompt_map()
    embeds, pooled = torch.randn(2, 77, 80), torch.randn(2, 48)
    mask = torch.ones(1)
    given = [[embeds, {"pooled_output": pooled, "mask": mask}]]
    ((found, options),) = comfyui_conditioning(given, erasure)
    expected = mapping(embeds, pooled)
    assert torch.equal(found, expected[0]) and torch.equal(options["pooled_output"], expected[1])
    assert options["mask"] is mask
    assert given[0][1]["pooled_output"] is pooled and not torch.equal(found, embeds)
    with pytest.raises(ValueError, match="conditioning: it has no pooled_output"):
        comfyui_conditioning([[embeds, {}]], erasure)


def test_without_a_pooled_vector_what_comfyui_hands_on_stays() -> None:
    with_factors = random_erasure(sd1().unet)
    embeds, vector = torch.randn(1, 77, 32, dtype=torch.float16), torch.randn(1, 32)
    given = [[embeds, {"pooled_output": vector}]]
    with pytest.raises(ValueError, match="factors that act layer by layer"):
        comfyui_conditioning(given, with_factors)
    alone = Erasure(with_factors.map, {}, with_factors.concepts, {}, {}, {})
    ((found, options),) = comfyui_conditioning(given, alone)
    assert found.dtype == torch.float16 and not torch.equal(found, embeds)
    assert options["pooled_output"] is vector


def test_the_nodes_pass_on_what_comfyui_gives(
    erased: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, _, erasure, _ = erased
    delta = str(erasure.save(tmp_path / "erasure.safetensors"))
    comfy, lora = ModuleType("comfy"), ModuleType("comfy.lora")
    lora.load_lora = load_lora  # type: ignore[attr-defined]
    comfy.lora = lora  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "comfy", comfy)
    monkeypatch.setitem(sys.modules, "comfy.lora", lora)
    spec = importlib.util.spec_from_file_location("nodes", ROOT / "tools" / "comfyui_nodes.py")
    assert spec is not None and spec.loader is not None
    nodes = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(nodes)
    for node in nodes.NODE_CLASS_MAPPINGS.values():
        inputs = node.INPUT_TYPES()["required"]
        values = {
            "model": before,
            "conditioning": [[torch.randn(1, 77, 80), {"pooled_output": torch.randn(1, 48)}]],
            "delta": delta,
            "strength": 1.0,
        }
        (found,) = getattr(node(), node.FUNCTION)(**{name: values[name] for name in inputs})
        if node.RETURN_TYPES == ("CONDITIONING",):
            # A saved prompt map, which may have gates, serves as well.
            values["delta"] = str(erasure.prompt_map().save(tmp_path / "map.safetensors"))
            (mapped,) = node().erase(values["conditioning"], values["delta"])
            assert torch.equal(mapped[0][0], found[0][0])
        if node.RETURN_TYPES == ("MODEL",):
            assert found.patches and not before.patches
        else:
            assert node.RETURN_TYPES == ("CONDITIONING",) and len(found) == 1
    assert set(nodes.NODE_DISPLAY_NAME_MAPPINGS) == set(nodes.NODE_CLASS_MAPPINGS)


def test_a_kohya_file_has_the_keys_that_comfyui_maps(erased: Any, tmp_path: Path) -> None:
    """Of SDXL these are ComfyUI's own keys with low lines, so its LoRA loader and A1111's find
    each layer."""
    patcher, _, erasure, unet = erased
    path = erasure.save_lora(tmp_path / "k.safetensors", unet, layout="kohya")
    layers = {key: key.removesuffix(".weight") for key in patcher.weights}
    known = {
        f"lora_unet_{layer.removeprefix('diffusion_model.').replace('.', '_')}": key
        for key, layer in layers.items()
    }
    names = {key.partition(".")[0] for key in load_file(path)}
    assert names <= known.keys()
    clone = comfyui_model(patcher, erasure, load_lora)
    assert {known[name] for name in names} == set(clone.patches)
