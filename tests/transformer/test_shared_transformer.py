"""One transformer as three variants: each predicts what the stock one does with such weights."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from diffusers import FluxPipeline
from tiny_families import denoise, flux, sd3, sd3_without_t5, sd35
from tiny_flow import LATENT, given, maps, prompts_of, shared_transformer
from torch import Tensor

from realera_fast.alignment import loss_of
from realera_fast.alignment.trainer import Batch
from realera_fast.models import class_of, text_projections
from realera_fast.runtime import progress_bar
from realera_fast.transformer import EulerSampler

BUILDS = [sd3, sd3_without_t5, sd35, flux]


def merged(transformer, variant: str, lora):
    """A copy whose weights are those of the variant."""
    student = copy.deepcopy(transformer)
    if variant != "original":
        for name, concept_map in zip(
            ("context_embedder", "time_text_embed.text_embedder.linear_1"),
            maps(transformer),
            strict=True,
        ):
            layer = student.get_submodule(name)
            layer.weight.data = layer.weight.data @ concept_map.matrix.to(layer.weight)
    if variant == "aligned":
        for name, part in lora.factors().items():
            layer = student.get_submodule(name)
            layer.weight.data = layer.weight.data + part.delta.to(layer.weight)
    return student


def stock(transformer, latents: Tensor, timesteps: Tensor, states: Tensor, zeros: int) -> Tensor:
    """What a transformer predicts, called as its pipeline calls it."""
    width = transformer.config.pooled_projection_dim
    sequence, pooled = states[:, :-1], states[:, -1, :width]
    sequence = torch.nn.functional.pad(sequence, (0, 0, 0, zeros))
    if class_of(transformer) == "SD3Transformer2DModel":
        return transformer(latents, sequence, pooled, timesteps).sample
    b, c, h, w = latents.shape
    rows = FluxPipeline._pack_latents(latents, b, c, h, w)
    places = FluxPipeline._prepare_latent_image_ids(b, h // 2, w // 2, "cpu", latents.dtype)
    velocity = transformer(
        hidden_states=rows,
        encoder_hidden_states=sequence,
        pooled_projections=pooled,
        timestep=timesteps.to(latents.dtype) / 1000,
        img_ids=places,
        txt_ids=torch.zeros(sequence.shape[1], 3, dtype=latents.dtype),
        guidance=torch.full((b,), 3.0),
    ).sample
    return FluxPipeline._unpack_latents(velocity, 8 * h, 8 * w, 8)


@pytest.mark.parametrize("build", [sd3, sd35, flux])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@torch.no_grad()
def test_each_variant_is_the_stock_transformer_with_such_weights(build, dtype):
    transformer = build().transformer.to(dtype)
    shared = shared_transformer(transformer, zero_rows=2)
    latents, timesteps, states, _ = given(transformer, dtype=torch.float64)
    states = states.to(torch.float64 if dtype == torch.float64 else torch.float32)
    found = {}
    with shared.installed():
        for variant in ("original", "edited", "aligned"):
            prompts = shared.condition(states, variant)
            found[variant] = shared.predict(latents.to(dtype), timesteps, prompts)
    wanted = {
        variant: stock(
            merged(transformer, variant, shared.lora),
            latents.to(dtype),
            timesteps,
            states.to(dtype),
            2,
        )
        for variant in found
    }
    assert torch.equal(found["original"], wanted["original"].to(found["original"]))
    # Maps and factors are float32.
    tolerance = 1e-6 if dtype == torch.float64 else 0.1
    for before, variant in (("original", "edited"), ("edited", "aligned")):
        apart = (wanted[variant].double() - wanted[before].double()).norm()
        assert (found[variant].double() - wanted[variant].double()).norm() < tolerance * apart


@pytest.mark.parametrize("build", [sd3, flux])
@pytest.mark.parametrize("targets", [("to_k", "to_v"), ("to_q", "to_out.0")])
def test_gradients_of_the_factors_are_those_of_merged_weights(build, targets):
    """Plain autograd through W + s up down, at the same factors."""
    transformer = build().transformer.double()
    shared = shared_transformer(transformer, targets=targets, dtype=torch.float64)
    latents, timesteps, states, goal = given(transformer, dtype=torch.float64)
    weight = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    batch = Batch(latents, timesteps, states, goal, weight, torch.eye(3, dtype=torch.float64))
    with shared.installed():
        loss, _ = loss_of(shared, batch)
        loss.backward()
    student = merged(transformer, "edited", shared.lora).requires_grad_(False)
    leaves, weights = {}, {}
    for name, pair in shared.lora.hidden.items():
        down, up = (x.detach().clone().requires_grad_() for x in pair)
        leaves[name] = (down, up)
        layer = student.get_submodule(name)
        weights[f"{name}.weight"] = layer.weight + shared.lora.scaling * up @ down
    with torch.nn.utils.stateless._reparametrize_module(student, weights):
        velocity = stock(student, latents, timesteps, states, 0)
        ((velocity - goal).square().flatten(1).mean(1) * weight).sum().backward()
    for name, pair in shared.lora.hidden.items():
        assert pair[1].grad is not None and pair[1].grad.abs().max() > 0
        for mine, plain in zip(pair, leaves[name], strict=True):
            assert (mine.grad - plain.grad).norm() < 1e-5 * plain.grad.norm()


@pytest.mark.parametrize(("build", "length"), [(sd3, 1e-5), (flux, 1e-2)])
def test_the_gradient_of_prompts_is_that_of_finite_differences(build, length):
    transformer = build().transformer.double()
    shared = shared_transformer(transformer, dtype=torch.float64)
    latents, timesteps, states, goal = given(transformer, dtype=torch.float64)
    way = torch.randn(states.shape, generator=torch.Generator().manual_seed(9)).double()

    def errors(step: float) -> Tensor:
        prompts = shared.condition(states + step * way, "aligned")
        velocity = shared.predict(latents, timesteps, prompts)
        return (velocity - goal).square().flatten(1).mean(1)

    with shared.installed():
        found, gradient = shared.error_gradient(latents, timesteps, states, goal, "aligned")
        with torch.no_grad():
            torch.testing.assert_close(found, errors(0.0))
            slope = (errors(length) - errors(-length)) / (2 * length)
    # The result is float32, and so are FLUX's rotary embeddings: its steps have to be longer.
    slope_found = (gradient.double() * way).flatten(1).sum(1)
    torch.testing.assert_close(slope_found, slope, rtol=1e-4 if build is sd3 else 1e-2, atol=0)
    assert gradient[:, -1].abs().max() > 0


def test_recomputed_activations_give_the_same_gradients():
    def gradients(checkpointed: bool) -> dict[str, Tensor]:
        transformer = sd3().transformer
        if checkpointed:
            transformer.enable_gradient_checkpointing()
        shared = shared_transformer(transformer)
        latents, timesteps, states, goal = given(transformer)
        batch = Batch(latents, timesteps, states, goal, torch.ones(3), torch.eye(3))
        with shared.installed():
            loss_of(shared, batch)[0].backward()
        return {name: value.grad for name, value in shared.lora.named_tensors().items()}

    once, again = gradients(False), gradients(True)
    assert all(torch.equal(once[name], again[name]) for name in once)


def test_others_may_draw_with_the_model_and_nothing_of_it_changes():
    transformer = sd3().transformer
    before = {name: value.clone() for name, value in transformer.state_dict().items()}
    shared = shared_transformer(transformer)
    latents, timesteps, states, _ = given(transformer)
    seen = []
    with torch.no_grad():
        plain = stock(transformer, latents, timesteps, states, 0)
        with shared.installed():
            shared.predict(latents, timesteps, shared.condition(states, "aligned"))
            other = threading.Thread(
                target=lambda: seen.append(stock(transformer, latents, timesteps, states, 0))
            )
            other.start()
            other.join()
    assert torch.equal(seen[0], plain)
    assert all(torch.equal(value, before[n]) for n, value in transformer.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in transformer.modules())


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("shift", ["static", "dynamic"])
def test_trajectories_are_those_of_the_stock_pipeline(build, shift):
    pipe = build()
    options = {"shift": 3.0} if shift == "static" else {"use_dynamic_shifting": True}
    pipe.scheduler = type(pipe.scheduler)(**options)
    pixels = LATENT * pipe.vae_scale_factor
    for scale in (1.0, 3.0):
        text, empty, zeros = prompts_of(pipe)
        shared = shared_transformer(pipe.transformer, zero_rows=zeros, guidance_scale=scale)
        sampler = EulerSampler(
            shared,
            pipe.scheduler,
            empty,
            steps=2,
            guidance_scale=scale,
            latent_size=LATENT,
            batch_size=4,
        )
        start = sampler.noise([5])
        with shared.installed(), progress_bar(total=1, desc="", progress=False) as bar:
            way = sampler.run(text.encode(["a photo of a cat"]), [5], "original", bar)
        packed = build is flux
        given_latents = pipe._pack_latents(start, 1, *start.shape[1:]) if packed else start
        latents = denoise(
            pipe,
            latents=given_latents,
            guidance_scale=scale,
            max_sequence_length=128,
            height=pixels,
            width=pixels,
        )
        if packed:
            latents = pipe._unpack_latents(latents, pixels, pixels, pipe.vae_scale_factor)
        torch.testing.assert_close(way.latents[-1], latents, rtol=1e-4, atol=1e-5)
        assert len(way.timesteps) == 2 and sampler.is_guided == (scale > 1 and not packed)


def test_a_perfect_flow_has_no_error():
    pipe = sd3()
    _, empty, _ = prompts_of(pipe)
    shared = shared_transformer(pipe.transformer)
    sampler = EulerSampler(
        shared,
        pipe.scheduler,
        empty,
        steps=2,
        guidance_scale=1.0,
        latent_size=None,
        batch_size=4,
    )
    pictures = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    sampler.teacher = lambda noisy, times, states: (
        (noisy - pictures) / (times / 1000)[:, None, None, None] + states.amax()
    )
    zero = torch.zeros(2, 3, 96)
    assert sampler.margin(pictures, zero, zero).abs().max() < 1e-6
    torch.testing.assert_close(sampler.margin(pictures, zero, zero + 1), torch.ones(2))


def test_text_projections_are_those_of_the_text_in_double_blocks():
    model = flux().transformer
    assert set(text_projections(model)) == {
        f"transformer_blocks.0.attn.{leaf}"
        for leaf in ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    }
    # The last block of SD3 gives no text.
    last = [name for name in text_projections(sd3().transformer) if ".1." in name]
    assert [name.rpartition(".")[2] for name in last] == ["add_k_proj", "add_v_proj"]
