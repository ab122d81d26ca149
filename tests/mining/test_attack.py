"""An attack finds prompts that bring predictions back, and repeats itself."""

import pytest
import torch
from tiny_models import tiny_pipeline

from realera_fast.mining.attack import attack, points_of
from realera_fast.solver import ConceptMap
from realera_fast.text import FreePrompts, TextModel
from realera_fast.unet import DDIMSampler, LoraParameters, SharedUNet


class Silent:
    def update(self, steps):
        pass


@pytest.fixture(scope="module")
def given():
    pipe = tiny_pipeline()
    text = TextModel(pipe.text_encoder, pipe.tokenizer)
    generator = torch.Generator().manual_seed(2)
    left, right = (0.3 * torch.randn(text.width, 3, generator=generator) for _ in range(2))
    shared = SharedUNet(
        pipe.unet.requires_grad_(False),
        ConceptMap(left, right.T.contiguous()),
        LoraParameters({}, {}, r=1, lora_alpha=1.0, seed=0),
    )
    sampler = DDIMSampler(
        shared,
        pipe.scheduler,
        text.encode([""]),
        steps=3,
        guidance_scale=3.0,
        latent_size=None,
        batch_size=8,
    )
    prompts = FreePrompts.of(text, "a photo of a {}", "cat cat cat", 3)
    with shared.installed():
        points = points_of(sampler, text.encode([prompts.prompt])[0], [1, 2, 3, 4], Silent())
    return shared, text, prompts, points


def found(given, *, steps=30, seeds=(5, 6, 7), part=slice(None)):
    shared, text, prompts, points = given
    some = prompts.with_vectors(v[part] for v in prompts.vectors.values())
    with shared.installed():
        return attack(shared, text, some, points, steps=steps, seeds=seeds[part], bar=Silent())


def test_points_are_the_originals_way(given):
    shared, text, prompts, points = given
    assert len(points.latents) == 3 * 4
    assert points.timesteps.reshape(3, 4).unique(dim=1).shape == (3, 1)
    with shared.installed(), torch.no_grad():
        states = text.encode([prompts.prompt]).expand(12, -1, -1)
        again = shared.predict(
            points.latents, points.timesteps, shared.condition(states, "original")
        )
    torch.testing.assert_close(again, points.shown, rtol=1e-4, atol=1e-5)


def test_it_comes_nearer_to_the_concept(given):
    outcome = found(given)
    first, last = outcome.errors
    assert bool((last < 0.9 * first).all()), outcome.errors
    assert not torch.equal(*(next(iter(outcome.prompts.vectors.values()))[i] for i in (0, 1)))


def test_it_repeats_itself_and_parts_are_the_whole(given):
    whole, again = (next(iter(found(given, steps=5).prompts.vectors.values())) for _ in "ab")
    assert torch.equal(whole, again)
    parts = [
        next(iter(found(given, steps=5, part=part).prompts.vectors.values()))
        for part in (slice(0, 1), slice(1, 3))
    ]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=1e-3)


def test_what_is_not_finite_ends_it(given):
    shared, text, prompts, points = given
    broken = type(points)(
        points.latents, points.timesteps, torch.full_like(points.shown, torch.nan)
    )
    with pytest.raises(FloatingPointError, match="not finite"):
        found((shared, text, prompts, broken))
