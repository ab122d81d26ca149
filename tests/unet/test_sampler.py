"""Windows of trajectories: what is denoised, shown and remembered."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from shares import Share
from tiny_models import tiny_pipeline

from realera_fast import embedded
from realera_fast.alignment import AlignmentConfig, Window, WindowFiller
from realera_fast.alignment.windows import _PROMPTS, word_numbers
from realera_fast.mining import Region
from realera_fast.models import projections
from realera_fast.runtime import Processes, progress_bar
from realera_fast.solver import ConceptMap
from realera_fast.text import TextModel, align
from realera_fast.unet import DDIMSampler, LoraParameters, SharedUNet

BEYOND = Region(-1.0, 0.5, 1.6)


class Words(list):
    """Aligned prompts, the first of them named."""

    named = 1


@pytest.fixture(scope="module")
def parts():
    pipe = tiny_pipeline()
    text = TextModel(pipe.text_encoder, pipe.tokenizer)
    templates = ["a photo of a {}", "{}", "a {}", "the {}", "image of a {}"]
    words = Words(align(text, word, "dog", templates) for word in ("cat", "kitten", "horse"))
    return pipe, text, words


def made(parts, processes=None, **options):
    pipe, text, words = parts
    width = text.width
    generator = torch.Generator().manual_seed(1)
    left = 0.2 * torch.randn(width, 2, generator=generator)
    lora = LoraParameters(projections(pipe.unet), {}, r=2, lora_alpha=2.0, seed=0)
    shared = SharedUNet(pipe.unet, ConceptMap(left, left.T.contiguous()), lora)
    sampler = DDIMSampler(
        shared,
        pipe.scheduler,
        text.encode([""]),
        steps=4,
        guidance_scale=3.0,
        latent_size=None,
        batch_size=options.pop("batch_size", 32),
    )
    config = AlignmentConfig(
        trajectories=4,
        preserve_trajectories=options.pop("preserve_trajectories", 4),
        original_trajectories=options.pop("original_trajectories", False),
        min_timestep=options.pop("min_timestep", 0.0),
        negative_guidance=options.pop("negative_guidance", 0.0),
    )
    defaults = {
        "beyond_region": BEYOND,
        "latents": {},
        "seed": 0,
        "processes": processes or Processes(),
    }
    preserve = text.encode(["a ship", "a tree", "a horse"])
    filler = WindowFiller(sampler, words, preserve, config, **(defaults | options))
    return shared, sampler, filler


def filled(parts, number=0, held_back=False, model="edited", **options) -> Window:
    shared, _, filler = made(parts, **options)
    with shared.installed(), progress_bar(total=1, desc="", progress=False) as progress:
        return filler.fill(number, model, progress, held_back=held_back)


def test_a_window_holds_every_point_of_every_trajectory(parts):
    window = filled(parts)
    assert [len(points) for points in (window.target, window.beyond, window.preserve)] == [16] * 3
    assert window.target.timesteps[:4].tolist() == [751, 501, 251, 1]
    assert torch.equal(window.target.latents, window.beyond.latents)
    for points in (window.target, window.beyond, window.preserve):
        assert points.teacher.shape == points.latents.shape
        assert int(points.prompt.max()) < len(points.states)
        assert all(tensor.isfinite().all() for tensor in points.tensors().values())


def test_teachers_are_what_the_original_model_predicts(parts):
    pipe, _, _ = parts
    window = filled(parts)
    with torch.no_grad():
        for points in (window.beyond, window.preserve):
            taken = points.take(torch.arange(len(points)))
            wanted = pipe.unet(
                taken.latents, taken.timesteps, encoder_hidden_states=taken.states
            ).sample
            torch.testing.assert_close(taken.teacher, wanted, rtol=1e-4, atol=1e-5)


def test_targets_follow_the_anchor_and_flee_the_concept(parts):
    pipe, _, words = parts
    plain, pushed = filled(parts), filled(parts, negative_guidance=2.0)
    taken = plain.target.take(torch.arange(len(plain.target)))
    with torch.no_grad():
        concept = pipe.unet(
            taken.latents, taken.timesteps, encoder_hidden_states=taken.states
        ).sample
    away = plain.target.teacher - 2.0 * (concept - plain.target.teacher)
    torch.testing.assert_close(pushed.target.teacher, away, rtol=1e-3, atol=1e-4)
    # Each point's goal is its own prompt's anchor.
    rows = {states.numpy().tobytes(): i for i, states in enumerate(words[0].source)}
    shown = [rows[s.numpy().tobytes()] for s in taken.states if s.numpy().tobytes() in rows]
    assert shown
    first = next(i for i, s in enumerate(taken.states) if s.numpy().tobytes() in rows)
    with torch.no_grad():
        goal = pipe.unet(
            taken.latents[first : first + 1],
            taken.timesteps[first : first + 1],
            encoder_hidden_states=words[0].anchor[shown[0]][None],
        ).sample
    torch.testing.assert_close(taken.teacher[first : first + 1], goal, rtol=1e-3, atol=1e-4)


def test_half_the_prompts_are_found_ones_which_mean_the_word(parts):
    pipe, text, words = parts
    count = 5
    generator = torch.Generator().manual_seed(8)
    found = dataclasses.replace(
        words[0],
        prompts=("free",) * count,
        anchor_prompts=words[0].anchor_prompts[:1] * count,
        **{
            name: getattr(words[0], name)[:1].expand(count, *[-1] * rank).clone()
            for name, rank in (("destination", 2), ("anchor", 2), ("weight", 1))
        },
        source=torch.randn(count, *words[0].source.shape[1:], generator=generator),
        found=count,
    )
    both = Words([words[0].with_found(found)])
    assert both[0].found == count and both[0].plain == words[0].plain
    for held_back, allowed in ((False, {0, 1, 2, 4}), (True, {3})):
        window = filled((pipe, text, both), negative_guidance=0.5, held_back=held_back)
        rows = {states.numpy().tobytes(): i for i, states in enumerate(found.source)}
        shown = [rows.get(states.numpy().tobytes()) for states in window.target.states]
        assert sum(number is not None for number in shown) == len(shown) / 2
        assert {number for number in shown if number is not None} <= allowed
        taken = window.target.take(torch.arange(len(window.target)))
        plain = words[0].source[words[0].plain]
        with torch.no_grad():
            of_word = pipe.unet(
                taken.latents,
                taken.timesteps,
                encoder_hidden_states=plain.expand_as(taken.states),
            ).sample
        is_found = torch.tensor([s.numpy().tobytes() in rows for s in taken.states])
        assert bool(is_found.any())
        torch.testing.assert_close(taken.shown[is_found], of_word[is_found], rtol=1e-4, atol=1e-5)


def test_trajectories_may_follow_word_and_anchor_with_the_original_by_turns(parts):
    pipe, _, _ = parts
    plain, turns = filled(parts), filled(parts, original_trajectories=True)
    ways = [w.target.latents.unflatten(0, (4, 4)) for w in (plain, turns)]
    same = [torch.equal(a, b) for a, b in zip(*ways, strict=True)]
    assert same == [True, False, False, True]
    original = filled(parts, model="original").target.latents.unflatten(0, (4, 4))
    torch.testing.assert_close(ways[1][1], original[1])
    assert turns.target.shown is None
    turns = filled(parts, original_trajectories=True, negative_guidance=0.5)
    taken = turns.target.take(torch.arange(len(turns.target)))
    with torch.no_grad():
        shown = pipe.unet(taken.latents, taken.timesteps, encoder_hidden_states=taken.states).sample
    torch.testing.assert_close(taken.shown, shown, rtol=1e-4, atol=1e-5)


def test_more_words_may_be_preserved_than_followed(parts):
    window = filled(parts, preserve_trajectories=6)
    assert len(window.target) == 16 and len(window.preserve) == 24


def test_held_back_prompts_are_never_trained_on(parts):
    _, _, words = parts

    def prompts(window):
        return {states.numpy().tobytes() for states in window.target.states}

    trained = set().union(*(prompts(filled(parts, number=n)) for n in range(3)))
    looked = prompts(filled(parts, held_back=True))
    assert looked and not trained & looked
    assert {words[i].source[3].numpy().tobytes() for i in range(3)} >= looked


def test_processes_make_the_parts_of_the_same_window(parts):
    # The same batches, so that the last digits agree.
    whole = filled(parts, batch_size=4)
    shares = [filled(parts, batch_size=4, processes=Share(rank, 2)) for rank in range(2)]
    for group in ("target", "beyond", "preserve"):
        first, second = (getattr(share, group) for share in shares)
        for name, tensor in getattr(whole, group).tensors().items():
            joined = torch.cat([getattr(first, name), getattr(second, name)])
            if name in ("teacher", "latents"):
                torch.testing.assert_close(joined, tensor, rtol=1e-4, atol=1e-5)
            elif name != "states" or group != "beyond":
                assert torch.equal(joined, tensor), (group, name)
            else:
                assert torch.equal(joined, tensor), "noise depends on the place in the batch"


def test_windows_and_seeds_differ_and_repeat(parts):
    first, again = filled(parts), filled(parts)
    assert all(torch.equal(v, again.tensors()[k]) for k, v in first.tensors().items())
    for other in (filled(parts, number=1), filled(parts, seed=1)):
        assert not torch.equal(first.target.latents, other.target.latents)
        assert not torch.equal(first.preserve.latents, other.preserve.latents)


def test_a_window_survives_its_checkpoint(parts):
    window = filled(parts)
    copy = Window.from_tensors(window.tensors(), torch.device("cpu"))
    assert all(torch.equal(v, copy.tensors()[k]) for k, v in window.tensors().items())


def test_late_steps_can_be_left_out(parts):
    window = filled(parts, min_timestep=0.4)
    assert set(window.target.timesteps.tolist()) == {751, 501}
    assert len(window.preserve) == 8


def test_pictures_take_the_place_of_trajectories(parts):
    pipe, _, _ = parts
    clean = torch.full((1, 4, 8, 8), 5.0)
    window = filled(parts, latents={"cat": clean})
    index = window.target.timesteps == 1
    # At the last time step there is hardly any noise.
    cats = window.target.latents[index][::2]
    others = window.target.latents[index][1::2]
    alpha = pipe.scheduler.alphas_cumprod[1]
    assert ((cats - alpha.sqrt() * 5.0).std() < 3 * (1 - alpha).sqrt()).all()
    assert (others.mean() - 5.0).abs() > 1.0


def test_the_original_model_tells_its_own_pictures_apart():
    pipe = embedded.load_pipeline()
    text = TextModel(pipe.text_encoder, pipe.tokenizer)
    lora = LoraParameters(projections(pipe.unet), {}, r=1, lora_alpha=1.0, seed=0)
    shared = SharedUNet(pipe.unet, ConceptMap.identity(text.width), lora)
    sampler = DDIMSampler(
        shared,
        pipe.scheduler,
        text.encode([""]),
        steps=10,
        guidance_scale=4.0,
        latent_size=None,
        batch_size=8,
    )
    states = text.encode(["a photo of a rabbit", "a photo of a house"])
    with shared.installed(), progress_bar(total=1, desc="", progress=False) as progress:
        pictures = sampler.run(states, [1, 2], "original", progress).latents[-1]
        margins = sampler.margin(pictures, states[[0, 0]], states[[1, 1]])
        swapped = sampler.margin(pictures, states[[1, 1]], states[[0, 0]])
    assert margins[0] > 0 > margins[1]
    torch.testing.assert_close(swapped, -margins)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_a_perfect_model_has_no_error_whatever_it_predicts(parts, kind, monkeypatch):
    _, sampler, _ = made(parts)
    sampler.scheduler.register_to_config(prediction_type=kind)
    pictures = torch.randn(1, 4, 8, 8)
    alphas = sampler.scheduler.alphas_cumprod

    def perfect(noisy, times, states):
        a, s = alphas[times[0]].sqrt(), (1 - alphas[times[0]]).sqrt()
        noise = (noisy - a * pictures) / s
        return {"epsilon": noise, "v_prediction": a * noise - s * pictures, "sample": pictures}[
            kind
        ]

    monkeypatch.setattr(sampler, "teacher", perfect)
    states = torch.zeros(1, 7, 32)
    right = sampler.margin(pictures, states, states)
    monkeypatch.setattr(
        sampler, "teacher", lambda n, t, s: perfect(n, t, s) + (1.0 if s.any() else 0.0)
    )
    assert right.item() == pytest.approx(0.0, abs=1e-6)
    assert sampler.margin(pictures, states, states + 1).item() == pytest.approx(1.0, rel=1e-3)


def test_beyond_is_left_out_where_it_has_no_weight(parts):
    window = filled(parts, beyond_region=None)
    assert window.beyond is None
    copy = Window.from_tensors(window.tensors(), torch.device("cpu"))
    assert copy.beyond is None and torch.equal(copy.target.latents, window.target.latents)


@pytest.mark.parametrize(
    ("window", "count", "named", "words", "wanted"),
    [
        (0, 4, 1, 1, [0, 0, 0, 0]),
        (0, 4, 3, 3, [0, 1, 2, 0]),
        (1, 4, 3, 3, [1, 2, 0, 1]),
        (0, 4, 1, 4, [0, 1, 0, 2]),
        (1, 4, 1, 4, [0, 3, 0, 1]),
        (0, 5, 2, 3, [0, 2, 1, 2, 0]),
        (0, 1, 2, 3, [0]),
    ],
)
def test_named_words_and_neighbors_take_turns(window, count, named, words, wanted):
    assert word_numbers(window, count, named, words) == wanted


def test_every_named_word_is_denoised(parts, caplog):
    _, _, filler = made(parts)
    filler.named, filler.prompts = 10, [None] * 30
    windows = filler.windows(60, 100)
    assert windows == 5
    seen = {n for w in range(windows) for n in word_numbers(w, 4, 10, 30)}
    assert set(range(10)) <= seen
    filler.named = filler.prompts = 0
    filler.named, filler.prompts = 1000, [None] * 1000
    assert filler.windows(60, 100) == 60
    assert "60 steps see 240 of 1000 named words" in caplog.text
    assert _PROMPTS == 8
