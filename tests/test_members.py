"""Members of a category, as the embedded model and the smallest models draw them."""

from __future__ import annotations

import importlib

import pytest
import torch
from tiny_families import FAMILIES
from torch.testing import assert_close

from realera_fast import Concept, EraseConfig, embedded, erase
from realera_fast.families import text_streams
from realera_fast.members import guidance_cosine
from realera_fast.mining import MiningConfig
from realera_fast.training import AlignmentConfig

CLOSED_FORM = EraseConfig(alignment=AlignmentConfig(enabled=False))


@pytest.fixture(scope="module")
def pipe():
    return embedded.load_pipeline(torch.bfloat16)


def cosines(pipe, names, words, **options):
    text = text_streams(pipe.unet, pipe.text_encoder, pipe.tokenizer)["sequence"][0]
    return guidance_cosine(
        pipe.unet, pipe.scheduler, names, words, text=text, empty=text.encode([""]),
        config=AlignmentConfig(**options),
    )  # fmt: skip


def test_members_are_told_from_other_words(pipe):
    before = {name: weight.clone() for name, weight in pipe.unet.state_dict().items()}
    processors = dict(pipe.unet.attn_processors)
    pipe.unet.train()
    found = cosines(pipe, ["food"], ["food", "banana", "gateau", "truck", "owl"])
    assert pipe.unet.training
    pipe.unet.eval()
    assert pipe.unet.attn_processors == processors
    assert all(torch.equal(before[k], v) for k, v in pipe.unet.state_dict().items())
    assert_close(found[0], torch.ones(()), rtol=1e-5, atol=1e-5)
    assert (found[1:3] > MiningConfig().member_cosine).all()
    assert (found[3:] < MiningConfig().member_cosine).all()


def test_a_word_does_not_depend_on_those_beside_it(pipe):
    """bfloat16 rounds products of other sizes differently."""
    words = ["banana", "truck", "cake", "castle", "owl"]
    many, few = (cosines(pipe, ["food"], words, sampling_batch_size=n) for n in (64, 6))
    assert_close(many, few, rtol=0.0, atol=0.05)


def test_the_name_that_fits_best_counts(pipe):
    words = ["banana", "castle"]
    food, building, both = (
        cosines(pipe, names, words) for names in (["food"], ["building"], ["food", "building"])
    )
    assert_close(both, torch.maximum(food, building), rtol=0.0, atol=0.05)


def test_nothing_is_asked_of_no_words(pipe):
    assert cosines(pipe, ["food"], []).shape == (0,)
    assert torch.equal(cosines(pipe, [], ["banana"]), torch.zeros(1))


def test_a_category_takes_its_members_with_it(pipe):
    result = erase(pipe, [Concept("clothing", kind="explicit")], config=CLOSED_FORM, progress=False)
    near = set(result.report["neighbors"]["clothing"])
    result.restore_(pipe.unet)
    assert {"hat", "headgear", "shoe", "sneaker", "crown", "tiara"} <= near
    assert not near & {"guitar", "castle", "apple", "dog"}


@pytest.fixture
def asked(monkeypatch):
    """Words of each search for members that is made."""
    found = []

    def counting(*arguments, **options):
        found.append(arguments[3])
        return guidance_cosine(*arguments, **options)

    monkeypatch.setattr(importlib.import_module("realera_fast.erase"), "guidance_cosine", counting)
    return found


@pytest.mark.parametrize("name", ["sd1", "sdxl", "sd3", "pixart_sigma"])
def test_every_family_takes_a_category(name, asked):
    """Drawn where the noise alignment runs, by the text alone elsewhere."""
    erase(FAMILIES[name](), [Concept("dog", kind="explicit")], config=CLOSED_FORM, progress=False)
    assert bool(asked) == (name in ("sd1", "sdxl"))


@pytest.mark.parametrize(
    "change", [{"in_channels": 9}, {"sample_size": None}, {"num_class_embeds": 3}]
)
def test_what_takes_more_than_a_prompt_goes_by_the_text(asked, change):
    """Inpainting, an unknown size, classes: erased all the same, and the report says so."""
    pipe = FAMILIES["sd1"]()
    options = {name: x for name, x in pipe.unet.config.items() if not name.startswith("_")}
    pipe.unet = type(pipe.unet)(**options | change)
    result = erase(pipe, [Concept("dog", kind="explicit")], config=CLOSED_FORM, progress=False)
    assert not asked
    assert any("members of a category" in text for text in result.report["warnings"])


def test_foreign_attention_goes_by_the_text(asked):
    class Own:
        def __call__(self, *arguments, **options):
            raise AssertionError("never run")

    pipe = FAMILIES["sd1"]()
    pipe.unet.set_attn_processor(Own())
    erase(pipe, [Concept("dog", kind="explicit")], config=CLOSED_FORM, progress=False)
    assert not asked


def test_numbers_that_are_not_finite_are_said_and_left_to_the_text(caplog):
    pipe = FAMILIES["sd1"]()
    with torch.no_grad():
        pipe.unet.conv_out.bias.fill_(torch.inf)
    assert torch.equal(cosines(pipe, ["dog"], ["cat", "ship"]), torch.zeros(2))
    assert "not finite" in caplog.text
