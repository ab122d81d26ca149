"""The second stage on flow transformers, from `erase` to an adapter in the stock pipeline."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler
from edits import CLOSED, edited
from model_state import weights
from shares import Share
from tiny_alignment import Words, kept_in
from tiny_families import denoise, flux, sd3
from tiny_flow import LATENT, maps, prompts_of
from tiny_variants import build

from realera_fast import Erasure, erase
from realera_fast.alignment import (
    AlignmentConfig,
    AlignmentPrompts,
    ClosedForm,
    Trainer,
    WindowFiller,
    align_noise,
    new_factors,
    sampler_of,
    shared_denoiser,
)
from realera_fast.mining import MiningConfig, Region
from realera_fast.models import components_of, family_of, streams
from realera_fast.runtime import Processes, checkpoint, progress_bar
from realera_fast.text import align

TRAINED = AlignmentConfig(
    steps=3,
    batch_size=2,
    trajectories=2,
    preserve_trajectories=2,
    sampling_steps=2,
    check_seeds=0,
    evaluation_steps=0,
    learning_rate=2e-2,
    latent_size=LATENT,
)


def config(**options):
    """Of a whole call of `erase`."""
    return dataclasses.replace(CLOSED, alignment=dataclasses.replace(TRAINED, **options))


@pytest.mark.parametrize("make", [sd3, flux])
def test_factors_are_kept_undone_saved_and_loaded_as_an_adapter(make, tmp_path):
    pipe = make()
    model = pipe.transformer
    before, original = weights(model), denoise(pipe)
    erasure = edited(pipe, config=config())
    assert erasure.report["alignment"]["steps"] == 3 and erasure.report["alignment"]["kept"]
    assert not any("alignment" in text for text in erasure.report["warnings"])
    blocks = range(len(model.transformer_blocks))
    added = {
        f"transformer_blocks.{i}.attn.{leaf}"
        for i in blocks
        for leaf in ("add_k_proj", "add_v_proj")
    }
    assert set(erasure.lora) == added
    changed = {n for n, value in weights(model).items() if not torch.equal(value, before[n])}
    assert changed == {f"{name}.weight" for name in (*added, *streams(model))}
    erased = denoise(pipe)
    apart = (erased - original).norm()
    loaded = Erasure.load(erasure.save(tmp_path / "erased.safetensors"))
    erasure.save_lora(tmp_path / "adapter", model)
    with pytest.raises(ValueError, match="use layout='diffusers'"):
        erasure.save_lora(tmp_path / "kohya", model, layout="kohya")
    erasure.restore_(model)
    assert all(torch.equal(value, before[n]) for n, value in weights(model).items())
    loaded.apply_(model)
    assert torch.equal(denoise(pipe), erased)
    loaded.restore_(model)
    pipe.load_lora_weights(tmp_path / "adapter")
    assert (denoise(pipe) - erased).norm() < 1e-3 * apart
    pipe.unload_lora_weights()
    # The factors have a part in it.
    dataclasses.replace(erasure, lora={}).apply_(model)
    assert (denoise(pipe) - erased).norm() > 1e-2 * apart


@pytest.mark.parametrize("make", [sd3, flux])
def test_self_attention_of_unets_is_refused(make):
    with pytest.raises(ValueError, match="'attn1.to_q' is of the self-attention of U-Nets.*to_out"):
        edited(make(), config=config(target_modules=("to_k", "attn1.to_q")))


def test_velocities_choose_the_time_steps_of_targets():
    options = {"sampling_steps": 6, "timesteps": "discriminative"}
    found = edited(sd3(), config=config(**options)).report["alignment"]
    every = edited(sd3(), config=config(sampling_steps=6)).report["alignment"]
    assert len(every["timesteps"]) == 6 and set(found["timesteps"]) < set(every["timesteps"])
    assert found["steps"] == 3


def test_it_is_checked_and_attacked_as_a_unet_is():
    options = {"adversary": "worst", "check_seeds": 1, "check_sampling_steps": 2}
    settings = config(**options, evaluation_steps=2)
    settings = dataclasses.replace(settings, mining=MiningConfig(attack_rounds=1))
    report = edited(sd3(), config=settings).report
    found = report["alignment"]
    assert any("nothing was attacked" in told for told in report["warnings"])
    assert found["steps"] == 3 and len(found["held_back"]) == 3
    for score in (found["closed_form"], found["aligned"]):
        assert score is None or all(map(torch.isfinite, map(torch.tensor, score.values())))
    assert found["closed_form"]["preserve"] > 0


def fused():
    pipe = sd3()
    pipe.transformer.fuse_qkv_projections()
    return pipe


@pytest.mark.parametrize(
    ("make", "latent_size", "message"),
    [
        (flux, None, "its config has no sample_size; name AlignmentConfig.latent_size"),
        (flux, 5, "sides are multiples of 2, and AlignmentConfig.latent_size is 5"),
        (sd3, 32, "multiples of 2 and at most 16, and AlignmentConfig.latent_size is 32"),
        (lambda: build("flux_fill")[0], LATENT, "it takes 24 channels and gives 4"),
        (fused, LATENT, "call unfuse_qkv_projections() first, and fuse again afterwards"),
    ],
)
def test_what_it_can_not_run_on_gets_the_closed_form_and_a_reason(make, latent_size, message):
    pipe = make()
    erasure = edited(pipe, config=config(latent_size=latent_size))
    (told,) = [text for text in erasure.report["warnings"] if "noise alignment runs on" in text]
    assert message in told and not erasure.report["alignment"]["steps"] and erasure.map.rank


def test_the_scheduler_has_to_be_that_of_the_flow():
    pipe = sd3()
    before = weights(pipe.transformer)
    for scheduler, message in (
        (FlowMatchHeunDiscreteScheduler(), "is not FlowMatchEulerDiscreteScheduler"),
        (FlowMatchEulerDiscreteScheduler(invert_sigmas=True), "from an image to noise"),
        (FlowMatchEulerDiscreteScheduler(num_train_timesteps=1), "too many for the 1 time steps"),
    ):
        with pytest.raises(ValueError, match=message):
            edited(pipe, config=config(), scheduler=scheduler)
    assert all(torch.equal(value, before[n]) for n, value in weights(pipe.transformer).items())
    # From its parts no scheduler is known, and none is guessed.
    parts = components_of(pipe)
    erasure = erase(
        parts.model,
        parts.text_encoders,
        ["cat=dog"],
        tokenizer=parts.tokenizers,
        config=config(),
        progress=False,
    )
    (told,) = [text for text in erasure.report["warnings"] if "noise alignment runs on" in text]
    assert told.endswith("pass scheduler=pipe.scheduler")


def test_rows_of_zeros_stand_for_t5_as_many_as_the_reading_says():
    pipe = sd3()
    encoders = components_of(pipe).text_encoders
    family = family_of(pipe.transformer, 3)
    short = dataclasses.replace(family.sections[1][0], max_tokens=1)
    other = dataclasses.replace(family, sections=(family.sections[0], (short,)))
    without = (*encoders[:2], None)
    assert family.absent_rows(encoders) == 0 and family.absent_rows(without) == 256
    assert other.absent_rows(without) == 1


@pytest.fixture(scope="module")
def parts():
    pipe = sd3()
    text, empty, _ = prompts_of(pipe)
    words = Words(align(text, "cat", "dog", [t]) for t in ("a photo of a {}",))
    return pipe, text, empty, words


def aligned(parts, options, **more):
    pipe, text, empty, words = parts
    sequence, pooled = maps(pipe.transformer)
    prompts = AlignmentPrompts(words, words, text.encode(["a ship", "a tree"]), empty)
    return align_noise(
        pipe.transformer,
        pipe.scheduler,
        ClosedForm({"sequence": sequence, "pooled": pooled}),
        prompts,
        options,
        MiningConfig(),
        seed=0,
        **more,
    )


def test_stopped_at_a_step_it_ends_with_the_same_bits(parts, tmp_path, monkeypatch):
    options = dataclasses.replace(TRAINED, steps=4, refresh_steps=2, evaluation_steps=2)
    monkeypatch.setattr(checkpoint, "SECONDS", 0.0)
    whole = aligned(parts, options, execution=kept_in(tmp_path / "whole"))
    step = Trainer.step

    def stopped(self, window, number):
        if number == 3:
            raise KeyboardInterrupt
        return step(self, window, number)

    monkeypatch.setattr(Trainer, "step", stopped)
    with pytest.raises(KeyboardInterrupt):
        aligned(parts, options, execution=kept_in(tmp_path / "stopped"))
    monkeypatch.setattr(Trainer, "step", step)
    again = aligned(parts, options, execution=kept_in(tmp_path / "stopped", resume=True))
    assert again.losses == whole.losses and len(whole.losses) == 4
    for name, part in whole.lora.items():
        assert torch.equal(part.down, again.lora[name].down)
        assert torch.equal(part.up, again.lora[name].up) and bool(part.up.any())


def test_processes_make_the_parts_of_the_same_window(parts):
    pipe, text, empty, words = parts
    sequence, pooled = maps(pipe.transformer)
    options = dataclasses.replace(TRAINED, sampling_batch_size=2)
    shared = shared_denoiser(
        pipe.transformer,
        ClosedForm({"sequence": sequence, "pooled": pooled}),
        new_factors(pipe.transformer, options, 0),
        options,
    )
    sampler = sampler_of(shared, pipe.scheduler, empty, options, options.sampling_steps)

    def filled(processes):
        filler = WindowFiller(
            sampler,
            words,
            text.encode(["a ship", "a tree"]),
            options,
            beyond_region=Region(-1.0, 0.5, 1.6),
            latents={},
            seed=0,
            processes=processes,
        )
        with progress_bar(total=1, desc="", progress=False) as bar:
            return filler.fill(0, "edited", bar)

    with torch.no_grad(), shared.installed():
        whole, *shares = (filled(p) for p in (Processes(), Share(0, 2), Share(1, 2)))
    for group in ("target", "beyond", "preserve"):
        first, second = (getattr(share, group).tensors() for share in shares)
        for name, tensor in getattr(whole, group).tensors().items():
            torch.testing.assert_close(torch.cat([first[name], second[name]]), tensor)
