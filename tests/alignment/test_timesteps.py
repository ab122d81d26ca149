"""The time steps that targets are trained at, beside a plain loop over the stock model."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from shares import Share
from tiny_alignment import UNCHECKED, Words, run
from tiny_models import tiny_pipeline

from realera_fast.alignment import (
    AlignmentConfig,
    ClosedForm,
    Trainer,
    WindowFiller,
    new_factors,
    sampler_of,
    shared_denoiser,
    timesteps,
)
from realera_fast.ops import philox
from realera_fast.runtime import Processes, progress_bar
from realera_fast.solver import ConceptMap
from realera_fast.text import TextModel, align

STEPS = 6
CONFIG = AlignmentConfig(
    trajectories=4, sampling_steps=STEPS, guidance_scale=3.0, timesteps="discriminative"
)
CHOSEN = dataclasses.replace(
    UNCHECKED, sampling_steps=STEPS, guidance_scale=3.0, timesteps="discriminative"
)


@pytest.fixture(scope="module")
def parts():
    pipe = tiny_pipeline()
    text = TextModel(pipe.text_encoder, pipe.tokenizer)
    words = Words(align(text, word, "dog", ["a photo of a {}", "{}"]) for word in ("cat", "ship"))
    return pipe, text, words


def filler(parts, words=None, processes=None, **options) -> WindowFiller:
    """Where the closed form is far from the original, which alone is to be asked."""
    pipe, text, known = parts
    config = dataclasses.replace(CONFIG, **options)
    pipe.unet.requires_grad_(False)
    left = torch.randn(text.width, 2, generator=torch.Generator().manual_seed(1))
    closed = ClosedForm({"sequence": ConceptMap(left, left.T.contiguous())})
    shared = shared_denoiser(pipe.unet, closed, new_factors(pipe.unet, config, 0), config)
    return WindowFiller(
        sampler_of(shared, pipe.scheduler, text.encode([""]), config, STEPS),
        words or known,
        text.encode(["a ship", "a tree"]),
        config,
        beyond_region=None,
        latents={},
        seed=3,
        processes=processes or Processes(),
    )


def chosen(it: WindowFiller) -> list[bool]:
    with it.sampler.shared.installed(), progress_bar(total=1, desc="", progress=False) as bar:
        it.choose(bar)
    return it.trained.tolist()


@torch.no_grad()
def plain_gaps(parts) -> torch.Tensor:
    """`[s]` L_a - L_c, from the stock pipeline and the formula of its schedule."""
    pipe, text, words = parts
    pipe.scheduler.set_timesteps(STEPS)
    empty, total = text.encode([""]), torch.zeros(STEPS)
    for place in range(CONFIG.trajectories):
        # One word is named: each trajectory is of it.
        word = words[0]
        concept, anchor = word.source[word.plain][None], word.anchor[word.plain][None]

        latents, noise = (
            torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
            for seed in (
                philox.fold_seed(3, n + place) for n in (timesteps._STARTS, timesteps._NOISE)
            )
        )
        for t in pipe.scheduler.timesteps:
            free, asked = (
                pipe.unet(latents, t, encoder_hidden_states=states).sample
                for states in (empty, concept)
            )
            guided = free + CONFIG.guidance_scale * (asked - free)
            latents = pipe.scheduler.step(guided, t, latents).prev_sample
        for number, t in enumerate(pipe.scheduler.timesteps):
            share = pipe.scheduler.alphas_cumprod[t]
            noisy = share.sqrt() * latents + (1 - share).sqrt() * noise
            of_concept, of_anchor = (
                (pipe.unet(noisy, t, encoder_hidden_states=states).sample - noise).square().mean()
                for states in (concept, anchor)
            )
            total[number] += (of_anchor - of_concept) / CONFIG.trajectories
    return total


def test_the_steps_are_those_of_a_plain_loop(parts):
    gaps = plain_gaps(parts)
    wanted = (gaps >= gaps.mean()) & (gaps > 0)
    assert 0 < int(wanted.sum()) < STEPS
    assert chosen(filler(parts)) == wanted.tolist()


def test_targets_have_these_steps_and_what_stays_has_all(parts):
    it = filler(parts)
    mask = torch.tensor(chosen(it))
    with it.sampler.shared.installed(), progress_bar(total=1, desc="", progress=False) as bar:
        window = it.fill(0, "edited", bar)
    every = it.sampler.timesteps
    assert window.target.timesteps.tolist() == every[mask].tolist() * CONFIG.trajectories
    assert set(window.preserve.timesteps.tolist()) == set(every.tolist())
    whole = filler(parts)
    with whole.sampler.shared.installed(), progress_bar(total=1, desc="", progress=False) as bar:
        full = whole.fill(0, "edited", bar).target.latents.unflatten(0, (-1, STEPS))
    assert torch.equal(window.target.latents, full[:, mask].flatten(0, 1))


def test_where_nothing_tells_them_apart_all_are_trained(parts, caplog):
    _, _, words = parts
    same = Words(dataclasses.replace(word, anchor=word.source) for word in words)
    assert chosen(filler(parts, same)) == [True] * STEPS
    assert "at no time step does the model tell" in caplog.text


def test_steps_that_are_left_out_stay_out(parts):
    it = filler(parts)
    mask, times = chosen(it), it.sampler.timesteps.tolist()
    assert sum(mask) > 1
    first = mask.index(True)
    left = filler(parts, min_timestep=times[first] / it.sampler.train_timesteps)
    assert chosen(left) == [number == first for number in range(STEPS)]


def test_nothing_left_of_both_is_an_error(parts, monkeypatch):
    last = torch.tensor([False] * (STEPS - 1) + [True])
    monkeypatch.setattr(
        "realera_fast.alignment.windows.discriminative_steps", lambda *_, **__: last
    )
    with pytest.raises(ValueError, match=r"min_timestep: 0.5 leaves none of the time steps \[1\]"):
        chosen(filler(parts, min_timestep=0.5))


def test_processes_look_at_parts_of_the_same_pictures(parts):
    seen = {}

    class Told(Share):
        def gather(self, tensor):
            seen[self.rank, self.count] = tensor
            return tensor

    for rank, count in ((0, 1), (0, 2), (1, 2)):
        chosen(filler(parts, processes=Told(rank, count)))
    assert seen[0, 1].shape == (CONFIG.trajectories, STEPS)
    joined = torch.cat([seen[0, 2], seen[1, 2]])
    torch.testing.assert_close(joined, seen[0, 1], rtol=1e-3, atol=1e-5)


def test_training_is_at_these_steps_and_says_so(parts, monkeypatch):
    seen = set()
    batch = Trainer.batch

    def told(self, *arguments):
        found = batch(self, *arguments)
        seen.update(found.timesteps[: found.targets].tolist())
        return found

    monkeypatch.setattr(Trainer, "batch", told)
    result = run(parts[:2], CHOSEN, seed=3)
    told_of = result.to_dict()["timesteps"]
    assert seen <= set(told_of) and 0 < len(told_of) < STEPS
    assert run(parts[:2], CHOSEN, seed=3).losses == result.losses
    every = run(parts[:2], dataclasses.replace(CHOSEN, timesteps="all"))
    assert len(every.timesteps) == STEPS and set(told_of) < set(every.timesteps)
