"""The worst neighbor: its gradient is right, it stays in its region, it shows the concept more."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tiny_alignment import UNCHECKED, run
from tiny_families import sdxl
from tiny_models import tiny_pipeline, tiny_unet

from realera_fast.alignment import AlignmentConfig
from realera_fast.alignment.adversary import Adversary, adversary_of, worst_neighbor
from realera_fast.alignment.check import AlignmentScore, HeldOutCheck
from realera_fast.mining import MiningConfig, Region, retract, sample
from realera_fast.models import projections, queries_and_outputs
from realera_fast.solver import ConceptMap
from realera_fast.text import TextModel
from realera_fast.unet import LoraParameters, SharedUNet

WIDTH = 32
NEAR = Region(0.5, 1.0, 0.5)


def shared_unet(dtype=torch.float32, targets=("to_k", "to_v"), unet=None) -> SharedUNet:
    unet = tiny_unet(WIDTH) if unet is None else unet
    leaves = tuple(f".{name}" for name in targets)
    lora = LoraParameters(
        {n: x for n, x in projections(unet).items() if n.endswith(leaves)},
        {n: x for n, x in queries_and_outputs(unet).items() if n.endswith(leaves)},
        r=3,
        lora_alpha=6.0,
        seed=1,
        dtype=torch.float64 if dtype == torch.float64 else torch.float32,
    )
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in lora.named_tensors().items():
            if name.endswith("up"):
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    left, right = (0.1 * torch.randn(WIDTH, 2, generator=generator) for _ in range(2))
    return SharedUNet(
        unet.to(dtype).requires_grad_(False), ConceptMap(left, right.T.contiguous()), lora
    )


def given(count=4, dtype=torch.float32):
    """Latents, time steps, prompts, and what the original predicts for them."""
    generator = torch.Generator().manual_seed(6)
    latents, shown = (torch.randn(count, 4, 8, 8, generator=generator, dtype=dtype) for _ in "ab")
    timesteps = torch.randint(0, 1000, (count,), generator=generator)
    return latents, timesteps, torch.randn(count, 7, WIDTH, generator=generator, dtype=dtype), shown


@pytest.mark.parametrize("targets", [("to_k", "to_v"), ("to_v",), ("to_k", "to_q", "to_out.0")])
@pytest.mark.parametrize("variant", ["original", "edited", "aligned"])
def test_the_gradient_is_that_of_finite_differences(variant, targets):
    shared = shared_unet(torch.float64, targets)
    latents, timesteps, states, goal = given(dtype=torch.float64)
    generator = torch.Generator().manual_seed(9)
    way = torch.randn(states.shape, generator=generator, dtype=torch.float64)

    def errors(step: float) -> torch.Tensor:
        prompts = shared.condition(states + step * way, variant)
        noise = shared.predict(latents, timesteps, prompts)
        return (noise - goal).square().flatten(1).mean(1)

    with shared.installed():
        found, gradient = shared.error_gradient(latents, timesteps, states, goal, variant)
        with torch.no_grad():
            torch.testing.assert_close(found, errors(0.0))
            slope = (errors(1e-4) - errors(-1e-4)) / 2e-4
    # The result is float32.
    torch.testing.assert_close(
        (gradient.double() * way).flatten(1).sum(1), slope, rtol=1e-4, atol=1e-7
    )


@pytest.mark.parametrize("variant", ["original", "edited"])
def test_the_gradient_reaches_the_pooled_vector(variant):
    pipe = sdxl()
    lora = LoraParameters({}, {}, r=1, lora_alpha=1.0, seed=0)
    generator = torch.Generator().manual_seed(3)
    sequence, pooled = (
        ConceptMap(0.1 * torch.randn(n, 2, generator=generator), torch.randn(2, n) / n)
        for n in (pipe.unet.config.cross_attention_dim, pipe.text_encoder_2.config.projection_dim)
    )
    shared = SharedUNet(pipe.unet.requires_grad_(False), sequence, lora, pooled_map=pooled)
    latents, goal = (torch.randn(2, 4, 8, 8, generator=generator) for _ in "ab")
    timesteps = torch.tensor([300, 700])
    states = torch.randn(2, 6, sequence.width, generator=generator)
    way = torch.zeros_like(states)
    way[:, -1] = torch.randn(2, sequence.width, generator=generator)

    def errors(step: float) -> torch.Tensor:
        prompts = shared.condition(states + step * way, variant)
        return (shared.predict(latents, timesteps, prompts) - goal).square().flatten(1).mean(1)

    with shared.installed():
        _, gradient = shared.error_gradient(latents, timesteps, states, goal, variant)
        with torch.no_grad():
            slope = (errors(0.05) - errors(-0.05)) / 0.1
    found = (gradient * way).flatten(1).sum(1)
    assert bool((slope.abs() > 1e-6).all())
    torch.testing.assert_close(found, slope, rtol=0.05, atol=1e-5)


@pytest.mark.parametrize("steps", [1, 4])
def test_it_stays_in_its_region_and_begin_of_text_stays(steps):
    shared = shared_unet()
    latents, timesteps, states, shown = given()
    with shared.installed():
        moved = Adversary(shared, NEAR, steps).moved(latents, timesteps, states, shown, seed=1)
    assert torch.equal(moved[:, 0], states[:, 0])
    e, x = states[:, 1:].flatten(1), moved[:, 1:].flatten(1)
    distance = (x - e).norm(dim=1) / e.norm(dim=1)
    cosine = torch.cosine_similarity(x, e)
    assert bool((distance <= NEAR.max_distance + 1e-5).all())
    assert bool((cosine >= NEAR.min_cosine - 1e-5).all())
    # A sign in every element goes to the edge.
    assert bool((distance > 0.3 * NEAR.max_distance).all())


def test_more_steps_show_more_of_the_concept_than_chance():
    shared = shared_unet()
    latents, timesteps, states, shown = given(8)

    def error(steps: int) -> float:
        with shared.installed():
            moved = Adversary(shared, NEAR, steps).moved(latents, timesteps, states, shown, seed=1)
            return float(
                shared.error_gradient(latents, timesteps, moved, shown, "aligned")[0].sum()
            )

    random, one, many = error(0), error(1), error(8)
    assert one < random and many < random


def test_rows_of_a_part_move_as_those_of_the_whole():
    shared = shared_unet()
    arguments = given(6)
    adversary = Adversary(shared, NEAR, 1)
    with shared.installed():
        whole = adversary.moved(*arguments, seed=3)
        parts = [
            adversary.moved(*(x[part] for x in arguments), seed=3, offset=part.start)
            for part in (slice(0, 2), slice(2, 6))
        ]
    # A sign flips where its gradient is rounding alone.
    same = (whole == torch.cat(parts)).float().mean()
    assert same > 0.99


def test_points_of_a_region_are_left_alone_and_others_come_to_its_edge():
    generator = torch.Generator().manual_seed(2)
    embeddings = torch.randn(5, 7, 16, generator=generator)
    inside = sample(embeddings, NEAR, samples=1, seed=4).rows()[:, 0]
    assert torch.equal(retract(inside, embeddings, NEAR), inside)
    far = embeddings + torch.randn(embeddings.shape, generator=generator)
    far[:, 0] = embeddings[:, 0]
    back = retract(far, embeddings, NEAR)
    e, x, y = (t[:, 1:].flatten(1) for t in (embeddings, far, back))
    distance = (y - e).norm(dim=1) / e.norm(dim=1)
    torch.testing.assert_close(distance, torch.full((5,), NEAR.max_distance), rtol=1e-3, atol=0)
    assert bool((torch.cosine_similarity(y - e, x - e) > 1 - 1e-5).all())
    assert torch.equal(retract(embeddings, embeddings, NEAR), embeddings)


def test_cosines_bind_as_distances_do():
    generator = torch.Generator().manual_seed(2)
    embeddings = torch.randn(5, 7, 16, generator=generator)
    far = embeddings + torch.randn(embeddings.shape, generator=generator)
    far[:, 0] = embeddings[:, 0]
    back = retract(far, embeddings, Region(0.95, 1.0, 9.0))
    cosine = torch.cosine_similarity(back[:, 1:].flatten(1), embeddings[:, 1:].flatten(1))
    torch.testing.assert_close(cosine, torch.full((5,), 0.95), rtol=1e-3, atol=0)


def test_settings_choose_the_adversary():
    shared, mining = shared_unet(), MiningConfig()
    assert adversary_of(shared, AlignmentConfig(), mining) is None
    drawn = adversary_of(shared, AlignmentConfig(adversary="random"), mining)
    assert drawn.steps == 0 and drawn.region == mining.neighbor_region
    config = AlignmentConfig(adversary="worst", adversary_steps=3, adversary_distance=0.25)
    worst = adversary_of(shared, config, mining)
    assert worst.steps == 3 and worst.region == Region(mining.min_cosine, 1.0, 0.25)
    assert worst.region == worst_neighbor(shared, config, mining).region


@pytest.fixture(scope="module")
def parts():
    pipe = tiny_pipeline()
    return pipe, TextModel(pipe.text_encoder, pipe.tokenizer)


WORST = dataclasses.replace(UNCHECKED, adversary="worst", evaluation_steps=4)


def test_training_on_the_worst_learns_and_repeats(parts):
    first = run(parts, dataclasses.replace(WORST, steps=40, gradient_checkpointing=True))
    assert sum(first.losses[-10:]) < sum(first.losses[:10])
    once, again = run(parts, WORST), run(parts, WORST)
    assert once.losses == again.losses
    assert run(parts, UNCHECKED).losses != once.losses


def test_not_a_number_in_the_inner_step_is_divergence(parts, monkeypatch, caplog):
    error_gradient = SharedUNet.error_gradient
    calls = []

    def poisoned(self, *arguments):
        errors, gradient = error_gradient(self, *arguments)
        calls.append(gradient)
        return errors, gradient * float("nan") if len(calls) == 6 else gradient

    monkeypatch.setattr(SharedUNet, "error_gradient", poisoned)
    result = run(parts, WORST)
    assert result.stopped.startswith("diverged") and "diverged" in caplog.text
    assert all(f.up.isfinite().all() for f in result.lora.values())


def test_the_check_reports_what_the_worst_brings_back(parts):
    config = dataclasses.replace(WORST, check_seeds=1, check_sampling_steps=3)
    result = run(parts, config)
    assert result.closed_form.worst >= 0.0
    assert "worst" in result.to_dict()["closed_form"]


def test_the_check_asks_an_attack_where_there_is_one(parts):
    near = {"edited": 0.9, "aligned": 0.3}
    config = dataclasses.replace(WORST, check_seeds=1, check_sampling_steps=3)
    result = run(parts, config, attacked=lambda shared, variant: near[variant])
    assert result.closed_form.worst == 0.9
    assert result.aligned is None or result.aligned.worst == 0.3


@pytest.mark.parametrize("adversary", ["none", "worst"])
def test_where_nothing_is_left_an_attack_may_still_find_something(parts, monkeypatch, adversary):
    gone = AlignmentScore(0.0, 0.0, 0.0, 0.0)
    monkeypatch.setattr(HeldOutCheck, "score", lambda *_: gone)
    config = dataclasses.replace(WORST, adversary=adversary, check_seeds=1)
    assert bool(run(parts, config).losses) is (adversary == "worst")
