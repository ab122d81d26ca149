"""What servers do with erasures: copies, pickles, threads, and gates in every surrounding."""

from __future__ import annotations

import contextlib
import copy
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch
from edits import edited
from model_state import equal, weights
from tiny_families import denoise, sd1

import realera_fast
from realera_fast import Erasure
from realera_fast.erasure import BaseModelMismatchError, applied
from realera_fast.runtime import locked

COPIES = [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))]


@pytest.fixture
def pipe() -> Any:
    return sd1()


@pytest.fixture
def erasure(pipe) -> Erasure:
    """Applied to the pipeline."""
    return edited(pipe)


@pytest.mark.parametrize("copied", COPIES)
def test_a_copied_erasure_does_what_the_first_does(pipe, erasure, copied, tmp_path):
    after, again = weights(pipe.unet), copied(erasure)
    assert again.fingerprint == erasure.fingerprint and again.report == erasure.report
    again.restore_(pipe.unet)
    assert equal(weights(pipe.unet), weights(sd1().unet))
    again.apply_(pipe.unet)
    assert equal(weights(pipe.unet), after)
    one, other = (e.save(tmp_path / f"{n}.safetensors") for n, e in enumerate((erasure, again)))
    assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize("copied", COPIES)
def test_a_copied_map_and_guard_do_what_the_first_do(pipe, erasure, copied):
    erasure.restore_(pipe.unet)
    guarded = realera_fast.guard(pipe, erasure, gate=False)
    expected = denoise(guarded.pipeline())
    assert torch.equal(denoise(copied(guarded).pipeline()), expected)
    given = torch.randn(2, 3, erasure.map.width)
    assert torch.equal(copied(guarded.prompt_map)(given), guarded.prompt_map(given))


@pytest.mark.parametrize("copied", COPIES)
def test_a_copied_model_is_an_edited_one_without_a_past(pipe, erasure, copied):
    other = copied(pipe.unet)
    before = weights(other)
    assert applied(other) == () and equal(before, weights(pipe.unet))
    with pytest.raises(ValueError, match="was not applied to this model in this process"):
        erasure.restore_(other)
    with pytest.raises(BaseModelMismatchError, match="load the base model it was made for"):
        erasure.apply_(other)
    assert equal(weights(other), before)
    # The first one is not held up by its copy.
    erasure.restore_(pipe.unet)
    assert equal(weights(pipe.unet), weights(sd1().unet)) and equal(weights(other), before)


@pytest.mark.parametrize("copied", COPIES)
def test_copies_of_fused_models_are_edited_apart(pipe, erasure, copied):
    erasure.restore_(pipe.unet)
    realera_fast.fuse(pipe)
    other = sd1()
    other.unet = copied(pipe.unet)
    original = denoise(pipe)
    assert torch.equal(denoise(other), original)
    erasure.apply_(other.unet)
    changed = denoise(other)
    assert torch.equal(denoise(pipe), original) and not torch.equal(changed, original)
    erasure.apply_(pipe.unet)
    assert torch.equal(denoise(pipe), changed)


def test_a_copy_with_an_attached_erasure_draws_and_is_not_restored(pipe, erasure):
    erasure.restore_(pipe.unet)
    erasure.apply_(pipe.unet, target="adapter")
    other = sd1()
    other.unet = copy.deepcopy(pipe.unet)
    assert torch.equal(denoise(other), denoise(pipe))
    with pytest.raises(ValueError, match="an adapter is attached"):
        erasure.restore_(other.unet)


def test_an_edit_waits_for_a_picture_that_holds_the_lock(pipe, erasure):
    edited_picture = denoise(pipe)
    erasure.restore_(pipe.unet)
    original = denoise(pipe)
    drawing, written = threading.Event(), threading.Event()

    def draw() -> torch.Tensor:
        with locked(pipe.unet):
            drawing.set()
            # The other one is waiting, or it would be done in this time.
            assert not written.wait(0.3)
            return denoise(pipe)

    def edit() -> None:
        assert drawing.wait(60)
        erasure.apply_(pipe.unet)
        written.set()

    with ThreadPoolExecutor(2) as pool:
        picture, done = pool.submit(draw), pool.submit(edit)
        assert torch.equal(picture.result(), original)
        done.result()
    assert torch.equal(denoise(pipe), edited_picture)


def test_gates_are_the_same_in_every_surrounding(pipe, erasure):
    erasure.restore_(pipe.unet)
    given = torch.randn(2, 3, erasure.map.width, device="cpu", dtype=torch.float32)
    plain = erasure.prompt_map(gate=True, pipe=pipe)

    def put(setting: Callable[[Any], None], value: Any, former: Any) -> Any:
        setting(value)
        return partial(setting, former)

    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.autocast("cpu", torch.bfloat16))
        stack.enter_context(torch.inference_mode())
        stack.callback(put(torch.set_default_dtype, torch.float64, torch.float32))
        stack.callback(put(torch.set_default_device, "meta", None))
        stack.callback(put(torch.use_deterministic_algorithms, True, False))
        inside = erasure.prompt_map(gate=True, pipe=pipe)
        mapped, opened = inside(given), inside.opened(given)
    assert not any(buffer.is_inference() for buffer in inside.buffers())
    assert equal(dict(inside.named_buffers()), dict(plain.named_buffers()))
    assert torch.equal(mapped, plain(given)) and torch.equal(opened, plain.opened(given))
