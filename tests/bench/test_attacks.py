"""The attacks of the benchmark find what is there to be found."""

from __future__ import annotations

import copy
import functools
import json

import pytest
import torch
from attacks import (
    concept_inversion,
    fine_tuning,
    image_to_image,
    null_text_inversion,
    prompt_optimization,
    prompt_search,
)
from attacks.denoising import encode_pictures, tokens_of
from quality import robustness

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


@torch.no_grad()
def misfit(pipe, latents, states):
    """Loss of the pictures with these embeddings `[n or 1, tokens, d]`."""
    generator, total = torch.Generator().manual_seed(1), 0.0
    for t in (300, 600, 800):
        eps = torch.randn(latents.shape, generator=generator)
        z = pipe.scheduler.add_noise(latents, eps, torch.tensor([t]))
        aim = pipe.scheduler.get_velocity(latents, eps, torch.tensor([t]))
        out = pipe.unet(z, t, encoder_hidden_states=states.expand(len(z), -1, -1)).sample
        total += float((out - aim).square().mean())
    return total


@torch.no_grad()
def encoded(pipe, prompt):
    return pipe.text_encoder(tokens_of(pipe, [prompt]))[0]


def free_misfit(pipe, latents, free):
    with free.installed():
        states = encoded(pipe, free.prompt)
    return misfit(pipe, latents, states)


def test_optimization_explains_pictures_better_than_its_start(pipe, rabbits):
    latents = encode_pictures(pipe, rabbits)
    assert latents.shape == (4, pipe.unet.config.in_channels, 8, 8)
    before = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    few = prompt_optimization.Settings(steps=1, batch_size=2, learning_rate=0.1)
    many = prompt_optimization.Settings(steps=25, batch_size=2, learning_rate=0.1)
    losses = [
        free_misfit(pipe, latents, prompt_optimization.optimize(pipe, latents, "house", 0, s))
        for s in (few, many)
    ]
    assert losses[1] < losses[0]
    assert all(torch.equal(v, before[k]) for k, v in pipe.unet.state_dict().items())
    assert not pipe.text_encoder.get_input_embeddings()._forward_hooks


def test_inversion_learns_a_token_for_what_the_model_knows(pipe, rabbits):
    latents = encode_pictures(pipe, rabbits)
    budget = concept_inversion.Settings(steps=25, batch_size=2, learning_rate=0.3)
    free = concept_inversion.invert(pipe, latents, 0, budget)
    assert free.prompt == "a photo of a thing"
    start, known = (
        misfit(pipe, latents, encoded(pipe, f"a photo of a {word}")) for word in ("thing", "rabbit")
    )
    # On the way from a word that means nothing to the word for what is shown.
    assert known < start
    assert free_misfit(pipe, latents, free) < known + 0.9 * (start - known)
    assert not pipe.text_encoder.get_input_embeddings()._forward_hooks


def test_null_texts_bring_a_picture_nearer_than_inversion_alone(pipe, rabbits):
    latents = encode_pictures(pipe, rabbits)[:2]

    def distance(inner_steps):
        budget = null_text_inversion.Settings(steps=3, inner_steps=inner_steps)
        found = encode_pictures(pipe, null_text_inversion.redraw(pipe, latents, budget))
        return float((found - latents).norm())

    alone, optimized = distance(0), distance(4)
    assert optimized < 0.9 * alone


def test_fine_tuning_learns_its_pictures_and_leaves_the_weights(pipe, rabbits):
    latents, caption = encode_pictures(pipe, rabbits), "a photo of a house"
    before = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    budget = fine_tuning.Settings(steps=10, batch_size=2, learning_rate=1e-3)
    untrained = misfit(pipe, latents, encoded(pipe, caption))
    with (
        pytest.raises(RuntimeError, match="stopped"),
        fine_tuning.fine_tuned(pipe, latents, [caption] * 4, 0, budget),
    ):
        assert misfit(pipe, latents, encoded(pipe, caption)) < untrained
        now = pipe.unet.state_dict()
        changed = {name for name, value in before.items() if not torch.equal(value, now[name])}
        assert changed and all(budget.layers in name for name in changed)
        raise RuntimeError("stopped")
    assert all(torch.equal(v, before[k]) for k, v in pipe.unet.state_dict().items())


def test_rows_of_attacks_have_their_budget_and_their_controls(tmp_path, monkeypatch):
    small = {
        concept_inversion: {"steps": 1, "batch_size": 1},
        null_text_inversion: {"steps": 1, "inner_steps": 1},
        fine_tuning: {"steps": 1, "batch_size": 1},
    }
    for module, budget in small.items():
        settings = functools.partial(module.Settings, **budget)
        monkeypatch.setattr(module, "Settings", settings)
    for name in ("PICTURES", "UNRELATED"):
        monkeypatch.setattr(robustness, name, 1)
    out = tmp_path / "rows.jsonl"
    controls = (robustness.UNERASED, robustness.ELSE, robustness.UNTRAINED)
    attacks = (robustness.INVERSION, robustness.NULL_TEXT, robustness.FINE_TUNING)
    words = ["--things", "cow", "--seeds", "0", "--dtype", "bfloat16", "--out", str(out)]
    robustness.main([*words, "--methods", *controls, "--attacks", *attacks])
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    found = {(row["method"], row["attack"]): row["success"] for row in rows}
    assert set(found) == {(m, a) for m in controls[:2] for a in attacks} | {
        (robustness.UNTRAINED, robustness.NULL_TEXT)
    }
    assert found[robustness.UNERASED, robustness.FINE_TUNING] == 1.0
    assert all(found[robustness.ELSE, attack] == 0.0 for attack in attacks)
    assert all(row["budget"]["steps"] == 1 for row in rows)


def test_redrawing_keeps_more_at_less_strength(pipe, rabbits):
    def change(strength):
        found = image_to_image.redraw(
            pipe, rabbits, ["a photo of a house"] * 4, strength, steps=8, guidance=4.0, seed=0
        )
        assert len(found) == 4 and found[0].size == rabbits[0].size
        preprocess = pipe.image_processor.preprocess
        return float((preprocess(found) - preprocess(rabbits)).abs().mean())

    assert change(0.25) < change(0.9)


def test_a_style_and_a_category_are_asked_for_and_judged_as_such():
    table = embedded.words()
    style, weapon, thing = (
        robustness.subject_of(table, name, 3) for name in ("mosaic", "weapon", "cat")
    )
    assert (style.kind, weapon.kind, thing.kind) == ("style", "category", "thing")
    assert style.concept.anchor == "color" and style.concept.kind == "style"
    assert all("mosaic" in prompt for prompt in style.prompts)
    assert not any("mosaic" in prompt for prompt in (*style.others, *style.unrelated))
    members = {thing.name for thing in table.things if thing.kind == "weapon"}
    assert weapon.shown == members and weapon.concept.kind == "explicit"
    assert set(weapon.prompts) < {table.prompts(table.thing(name))[0] for name in members}
    assert not set(weapon.unrelated) & {table.prompts(table.thing(n))[0] for n in members}
    assert weapon.prompts != robustness.subject_of(table, "weapon", 4).prompts
    for subject in (style, weapon, thing):
        counts = [len(p) for p in (subject.prompts, subject.others, subject.unrelated)]
        assert counts == [robustness.PICTURES] * 2 + [robustness.UNRELATED]
        # Free vectors take the place of the last tokens.
        assert all(text.endswith("{}") for text in (subject.template, *subject.templates))


@pytest.mark.parametrize("name", ["mosaic", "weapon"])
def test_attacks_on_a_style_and_a_category_have_controls(name, tmp_path, monkeypatch):
    few = functools.partial(prompt_optimization.Settings, steps=1, batch_size=1)
    monkeypatch.setattr(prompt_optimization, "Settings", few)
    monkeypatch.setattr(robustness, "PICTURES", 2)
    out = tmp_path / "rows.jsonl"
    controls = (robustness.UNERASED, robustness.ELSE)
    words = ["--things", name, "--seeds", "0", "--dtype", "bfloat16", "--out", str(out)]
    attacks = ("no attack", "prompt search*", robustness.OPTIMIZATION, "image to image, 0.9")
    robustness.main([*words, "--methods", *controls, "--attacks", *attacks])
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    found = {(row["method"], row["attack"]): row["success"] for row in rows}
    kept = ("no attack", robustness.OPTIMIZATION, "image to image, 0.9")
    assert set(found) == {(robustness.UNERASED, attack) for attack in kept} | {
        (robustness.ELSE, "image to image, 0.9")
    }
    assert found[robustness.UNERASED, "no attack"] == 1.0
    assert found[robustness.UNERASED, "image to image, 0.9"] == 1.0
    assert found[robustness.ELSE, "image to image, 0.9"] < 1.0
    assert {(row["thing"], row["kind"]) for row in rows} == {
        (name, "style" if name == "mosaic" else "category")
    }


def test_attacks_meet_what_moves_prompts_at_run_time(pipe, rabbits):
    """An attack that reads the text encoder alone would see a model that nobody draws with."""
    latents = encode_pictures(pipe, rabbits)
    own = copy.copy(pipe)
    asked = []

    def encode_prompt(prompts, *arguments, **options):
        asked.append(prompts)
        embeds, *others = pipe.encode_prompt(prompts, *arguments, **options)
        return torch.zeros_like(embeds) + 0 * embeds, *others

    own.encode_prompt = encode_prompt
    few = prompt_optimization.Settings(steps=3, batch_size=1)
    found = [prompt_optimization.optimize(p, latents, "house", 0, few) for p in (own, pipe)]
    assert len(asked) == 3
    vectors = [free._vectors for free in found]
    assert not torch.equal(*vectors)
    redrawn = [
        image_to_image.redraw(
            p, rabbits[:1], ["a photo of a house"], 0.9, steps=4, guidance=4.0, seed=0
        )[0]
        for p in (own, pipe)
    ]
    assert redrawn[0].tobytes() != redrawn[1].tobytes()
