"""A pipeline that is guarded request by request, and the gate on a text encoder with a meaning."""

from __future__ import annotations

import copy
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_families import flux, sd1

import realera_fast
from realera_fast import EraseConfig, embedded
from realera_fast.erasure import BaseModelMismatchError
from realera_fast.solver import ClosedFormConfig, PromptMap

CONFIG = replace(EraseConfig.fast(), closed_form=ClosedFormConfig(space="text"))
CALL = {"height": 32, "width": 32, "num_inference_steps": 2, "output_type": "latent"}


@pytest.fixture(scope="module")
def pipe() -> Any:
    pipe = embedded.load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def erasure(pipe):
    erasure = realera_fast.erase(pipe, ["cat"], config=CONFIG, progress=False)
    erasure.restore_(pipe.unet)
    return erasure


@pytest.fixture(scope="module")
def guarded(pipe, erasure):
    return realera_fast.guard(pipe, erasure)


def encoded(pipe: Any, prompts: list[str]) -> torch.Tensor:
    return pipe.encode_prompt(prompts, "cpu", 1, False)[0]


def draw(pipe: Any, prompt: str, **options: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return pipe(prompt, generator=generator, **CALL, **options).images


def test_the_gate_opens_for_the_concept_and_for_nothing_else(pipe, guarded):
    gone = ["cat", "a kitten", "two cats", "a tabby asleep on the sofa of an old house in winter"]
    stays = ["", "a photo of a ship", "a red car in front of a house", "pizza", "a tall tree"]
    given = encoded(pipe, gone + stays)
    opened = guarded.prompt_map.opened(given)
    assert opened.tolist() == [True] * len(gone) + [False] * len(stays)
    mapped = guarded.prompt_map(given)
    assert torch.equal(mapped[len(gone) :], given[len(gone) :])
    assert not torch.equal(mapped[0], given[0])


def test_guarded_pictures_are_those_of_mapped_prompts_or_the_same(pipe, erasure, guarded):
    assert torch.equal(draw(guarded, "a photo of a ship"), draw(pipe, "a photo of a ship"))
    given, empty = encoded(pipe, ["a photo of a cat"]), encoded(pipe, [""])
    mapped = erasure.prompt_map()(given)
    expected = draw(pipe, None, prompt_embeds=mapped, negative_prompt_embeds=empty)
    assert torch.equal(draw(guarded, "a photo of a cat"), expected)
    # Embeddings that a caller made are guarded as well.
    again = draw(guarded, None, prompt_embeds=given, negative_prompt_embeds=empty)
    assert torch.equal(again, expected)


def test_threads_draw_guarded_and_not_at_the_same_time(pipe, guarded):
    asked = [(who, p) for p in ("a cat", "a pizza") for who in (guarded, pipe)]
    alone = [draw(who, prompt) for who, prompt in asked]
    assert not torch.equal(alone[0], alone[1]) and torch.equal(alone[2], alone[3])
    before, scheduler = set(vars(pipe)), pipe.scheduler
    start = threading.Barrier(3)

    def together(place: int) -> torch.Tensor:
        start.wait(timeout=60)
        return draw(*asked[place])

    # The pipeline itself is one request's at a time, as ever.
    places = (0, 1, 2)
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(together, places))
    for place, picture in zip(places, found, strict=True):
        assert torch.equal(picture, alone[place])
    assert set(vars(pipe)) == before and pipe.scheduler is scheduler
    assert type(guarded.pipeline()) is type(pipe)


def test_several_erasures_guard_together(pipe, erasure, guarded):
    every = erasure.prompt_map()
    both = realera_fast.guard(pipe, [guarded.prompt_map, every]).prompt_map
    given = encoded(pipe, ["a cat", "a pizza"])
    assert torch.equal(both(given)[1:], every(given[1:]))
    assert torch.equal(both(given)[:1], guarded.prompt_map.sequence(every(given[:1])))
    # What both made is one erasure, whose words are in the reports of its parts.
    joined = erasure.then(erasure).prompt_map(gate=True, pipe=pipe)
    assert joined.opened(given).tolist() == [True, False]


def test_what_can_not_be_guarded_is_refused(pipe, erasure):
    with pytest.raises(ValueError, match="pipe: gate=True needs the text encoders"):
        erasure.prompt_map(gate=True)
    with pytest.raises(ValueError, match="pass the pipeline that it was made for"):
        erasure.prompt_map(gate=True, pipe=sd1())
    with pytest.raises(ValueError, match="erasure: expected one at least"):
        realera_fast.guard(pipe, [])
    with pytest.raises(TypeError, match="expected an Erasure or a PromptMap, got str"):
        realera_fast.guard(pipe, ["cat"])
    erasure.apply_(pipe.unet)
    try:
        with pytest.raises(ValueError, match="applied to this pipeline's weights already"):
            realera_fast.guard(pipe, erasure)
    finally:
        erasure.restore_(pipe.unet)
    parts = SimpleNamespace(unet=pipe.unet, text_encoder=pipe.text_encoder, tokenizer=None)
    with pytest.raises(ValueError, match="has no encode_prompt to guard"):
        realera_fast.guard(parts, erasure, gate=False)
    with pytest.raises(ValueError, match="clip_skip"):
        draw(realera_fast.guard(pipe, erasure, gate=False), "a cat", clip_skip=1)
    other = realera_fast.guard(flux(), erasure.prompt_map()).pipeline()
    with pytest.raises(ValueError, match="encode_prompt gave .* expected prompts of shape"):
        other("a cat", height=16, width=16, num_inference_steps=1, max_sequence_length=64)


def test_an_erasure_of_other_weights_is_refused(pipe, erasure):
    other = copy.copy(pipe)
    other.unet = copy.deepcopy(pipe.unet)
    with torch.no_grad():
        for weight in other.unet.parameters():
            weight.mul_(1.5)
    with pytest.raises(BaseModelMismatchError, match=r"was made for .* erasure\.rebase\(model\)"):
        realera_fast.guard(other, erasure, gate=False)
    realera_fast.guard(other, erasure.rebase(other.unet), gate=False)
    # One that was made after another needs it, before it or in the weights.
    erasure.apply_(pipe.unet)
    try:
        later = erasure.rebase(pipe.unet)
        realera_fast.guard(pipe, later, gate=False)
        # Another may be one that was made for the weights before them.
        beside = replace(erasure, report={"other": True}, map=erasure.map.compose(erasure.map))
        realera_fast.guard(pipe, beside, gate=False)
    finally:
        erasure.restore_(pipe.unet)
    realera_fast.guard(pipe, [erasure, later], gate=False)
    for stack in (later, [later, erasure]):
        with pytest.raises(BaseModelMismatchError, match="needs them before it"):
            realera_fast.guard(pipe, stack, gate=False)


def test_modules_that_move_between_calls_are_refused(pipe, erasure, monkeypatch):
    made_before = realera_fast.guard(pipe, erasure, gate=False)
    monkeypatch.setattr(pipe, "_all_hooks", [object()], raising=False)
    with pytest.raises(ValueError, match="enable_model_cpu_offload moves its modules"):
        realera_fast.guard(pipe, erasure, gate=False)
    with pytest.raises(ValueError, match="enable_model_cpu_offload moves its modules"):
        made_before.pipeline()


def test_weights_that_come_and_go_are_refused(erasure):
    from accelerate import cpu_offload

    offloaded = sd1()
    cpu_offload(offloaded.unet, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"pipe\.unet: the weights of .* are offloaded"):
        realera_fast.guard(offloaded, erasure, gate=False)


def test_a_scheduler_half_way_is_not_taken_over(pipe, erasure):
    guarded = realera_fast.guard(pipe, erasure, gate=False)
    before = dict(vars(guarded.pipeline().scheduler))
    pipe.scheduler.set_timesteps(7)
    after = vars(guarded.pipeline().scheduler)
    assert after["num_inference_steps"] == before["num_inference_steps"] != 7


def test_a_map_of_nothing_has_no_gate(pipe):
    nothing = realera_fast.erase(pipe, [], config=CONFIG, progress=False)
    with pytest.raises(ValueError, match="nothing to gate"):
        nothing.prompt_map(gate=True, pipe=pipe)
    assert isinstance(nothing.prompt_map(), PromptMap)
