"""The attacks of the benchmark find what is there to be found."""

from __future__ import annotations

import pytest
import torch
from attacks import image_to_image, prompt_optimization, prompt_search

from realera_fast import embedded
from realera_fast.evaluation import Sampling, generate


@pytest.fixture(scope="module")
def pipe():
    return embedded.load_pipeline()


@pytest.fixture(scope="module")
def rabbits(pipe):
    return generate(
        pipe,
        ["a photo of a rabbit"] * 4,
        range(4),
        Sampling(steps=4, guidance=4.0, height=64, width=64),
        progress=False,
    )


def test_search_comes_nearer_to_the_concept_without_its_name(pipe):
    few = prompt_search.Settings(population=30, generations=1, elite=4, prompts=2)
    many = prompt_search.Settings(population=30, generations=15, elite=4, prompts=2)
    short, long = (prompt_search.search(pipe, "rabbit", ("rabbit",), 0, s) for s in (few, many))
    assert len(long) == 2 and not any("rabbit" in prompt.split() for prompt in short + long)
    assert long == prompt_search.search(pipe, "rabbit", ("rabbit",), 0, many)

    def distance(prompt):
        tokens = pipe.tokenizer(
            [prompt, "a photo of a rabbit"], padding="max_length", return_tensors="pt"
        ).input_ids
        found, wanted = pipe.text_encoder(tokens)[0]
        return (found - wanted).norm()

    assert distance(long[0]) < distance(short[0])


def test_optimization_explains_pictures_better_than_its_start(pipe, rabbits):
    latents = prompt_optimization.encode_pictures(pipe, rabbits)
    assert latents.shape == (4, pipe.unet.config.in_channels, 8, 8)
    before = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    few = prompt_optimization.Settings(steps=1, batch_size=2, learning_rate=0.1)
    many = prompt_optimization.Settings(steps=25, batch_size=2, learning_rate=0.1)

    @torch.no_grad()
    def loss(settings):
        free = prompt_optimization.optimize(pipe, latents, "house", 0, settings)
        with free.installed():
            states = pipe.encode_prompt([free.prompt], "cpu", 1, False)[0].expand(4, -1, -1)
        generator, total = torch.Generator().manual_seed(1), 0.0
        for t in (300, 600, 800):
            eps = torch.randn(latents.shape, generator=generator)
            z = pipe.scheduler.add_noise(latents, eps, torch.tensor([t]))
            out = pipe.unet(z, t, encoder_hidden_states=states).sample
            total += float((out - eps).square().mean())
        return total

    assert loss(many) < loss(few)
    assert all(torch.equal(v, before[k]) for k, v in pipe.unet.state_dict().items())
    assert not pipe.text_encoder.get_input_embeddings()._forward_hooks


def test_redrawing_keeps_more_at_less_strength(pipe, rabbits):
    def change(strength):
        found = image_to_image.redraw(
            pipe, rabbits, "a photo of a house", strength, steps=8, guidance=4.0, seed=0
        )
        assert len(found) == 4 and found[0].size == rabbits[0].size
        preprocess = pipe.image_processor.preprocess
        return float((preprocess(found) - preprocess(rabbits)).abs().mean())

    assert change(0.25) < change(0.9)
