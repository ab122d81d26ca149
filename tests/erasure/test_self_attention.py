"""Factors of self-attention, whose layers are named like those that text enters."""

from __future__ import annotations

import copy

import pytest
import torch
from comfyui_types import in_comfyui, load_lora
from ldm_checkpoint import to_ldm
from model_state import same, weights
from tiny_families import FAMILIES, sd1

from realera_fast import Concept, Erasure
from realera_fast.alignment import AlignmentConfig, new_factors
from realera_fast.erasure import applied, comfyui_model
from realera_fast.models import base_hashes, is_self_attention, projections, self_attention
from realera_fast.solver import ConceptMap
from realera_fast.unet import SELF_ATTENTION, SharedUNet


def trained(unet, seed=0, targets=("to_k", *SELF_ATTENTION)):
    """What the stage trains, with random factors, and the erasure that it makes of them."""
    unet = copy.deepcopy(unet).requires_grad_(False)
    config = AlignmentConfig(target_modules=targets, r=2, lora_alpha=1.0)
    lora = new_factors(unet, config, seed)
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape):
        return 0.2 * torch.randn(shape, generator=generator)

    with torch.no_grad():
        for name, tensor in lora.named_tensors().items():
            if name.endswith("up"):
                tensor.copy_(noise(*tensor.shape))
    width = next(iter(projections(unet).values())).in_features
    text = ConceptMap(noise(width, 2), noise(2, width))
    made = {"base_hashes": base_hashes(unet), "model_class": type(unet).__name__}
    if set(targets) & set(SELF_ATTENTION):
        made["self_attention"] = True
    erasure = Erasure(text, lora.factors(), (Concept("cat", "dog"),), {}, made, {})
    return SharedUNet(unet, text, lora), erasure


def given(width=32):
    generator = torch.Generator().manual_seed(5)
    latents = torch.randn(2, 4, 8, 8, generator=generator)
    return latents, torch.tensor([900, 100]), torch.randn(2, 7, width, generator=generator)


def predicted(unet) -> torch.Tensor:
    latents, timesteps, states = given()
    with torch.no_grad():
        found: torch.Tensor = unet(latents, timesteps, encoder_hidden_states=states).sample
    return found


def student(shared, variant="aligned") -> torch.Tensor:
    latents, timesteps, states = given()
    with torch.no_grad(), shared.installed():
        return shared.predict(latents, timesteps, shared.condition(states, variant))


def close(got, wanted, before) -> bool:
    """Equal but for rounding, seen against what the edit does."""
    return bool((got - wanted).norm() < 1e-4 * (wanted - before).norm())


def test_text_width_and_hidden_width_are_the_same_somewhere():
    unet = sd1().unet
    widths = {layer.in_features for layer in self_attention(unet).values()}
    assert next(iter(projections(unet).values())).in_features in widths


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
def test_the_trained_variant_is_the_stock_model_with_the_adapter(tmp_path, layout):
    pipe = sd1()
    before = predicted(pipe.unet)
    shared, erasure = trained(pipe.unet)
    file = erasure.save_lora(tmp_path, pipe.unet, layout=layout)
    pipe.load_lora_weights(tmp_path, weight_name=file.name)
    assert close(predicted(pipe.unet), student(shared), before)
    pipe.unload_lora_weights()
    # The hooks are gone, and other variants never had the factors.
    assert torch.equal(predicted(shared.unet), before)
    assert close(student(shared, "original"), before, student(shared))
    assert not close(student(shared, "edited"), student(shared), before)


def test_it_is_applied_from_a_file_and_undone(tmp_path):
    unet = sd1().unet
    plain, before = predicted(unet), weights(unet)
    shared, erasure = trained(unet)
    loaded = Erasure.load(erasure.save(tmp_path / "cat.safetensors"))
    loaded.apply_(unet)
    assert close(predicted(unet), student(shared), plain)
    changed = {n for n, v in unet.state_dict().items() if not torch.equal(before[n], v)}
    assert sum(map(is_self_attention, changed)) == len(self_attention(unet))
    assert set(erasure.state_dict(unet)) == changed
    loaded.restore_(unet)
    assert same(unet, before)


def test_it_is_attached_and_taken_out():
    unet = sd1().unet
    plain, before = predicted(unet), weights(unet)
    shared, erasure = trained(unet)
    erasure.apply_(unet, target="adapter")
    assert applied(unet) == (erasure,) and close(predicted(unet), student(shared), plain)
    erasure.restore_(unet)
    assert same(unet, before) and torch.equal(predicted(unet), plain)


@pytest.mark.parametrize("swapped", [False, True])
def test_two_erasures_are_one_whichever_has_such_factors(swapped):
    unet = sd1().unet
    plain = predicted(unet)
    _, first = trained(unet)
    _, later = trained(unet, seed=1, targets=("to_v", "to_q"))
    if swapped:
        first, later = later, first
    both = first.then(later)
    both.apply_(unet)
    together = predicted(unet)
    both.restore_(unet)
    first.apply_(unet)
    later.rebase(unet).apply_(unet)
    assert close(together, predicted(unet), plain)


def test_comfyui_patches_them_too():
    unet = sd1().unet
    patcher = in_comfyui(to_ldm(unet))
    _, erasure = trained(unet)
    after = comfyui_model(patcher, erasure, load_lora).patched()
    expected = in_comfyui(to_ldm(erasure.apply_(unet))).weights
    changed = {k for k, v in patcher.weights.items() if not torch.equal(v, after[k])}
    assert sum(".attn1." in key for key in changed) == len(self_attention(unet))
    for key, weight in expected.items():
        torch.testing.assert_close(after[key], weight, rtol=1e-4, atol=1e-5)


def test_models_without_self_attention_and_fused_ones_are_refused():
    unet = sd1().unet
    attn = next(m for n, m in unet.named_modules() if n.endswith("attn1"))
    attn.fuse_projections()
    attn.set_processor(type("FusedAttnProcessor2_0", (), {})())
    with pytest.raises(ValueError, match=r"attn1 runs fused projections.*unfuse_qkv_projections"):
        self_attention(unet)
    with pytest.raises(ValueError, match="this SD3Transformer2DModel has no self-attention"):
        self_attention(FAMILIES["sd3"]().transformer)
