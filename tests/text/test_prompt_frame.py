"""The text that pipelines put around a prompt, and where prompts stand in it."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from tiny_language import LANGUAGE, flux2_dev, flux2_klein, lumina2, qwen_image
from tiny_models import tiny_text_encoder, tiny_tokenizer
from tiny_video import wan

from realera_fast.models import components_of, family_of, text_streams
from realera_fast.text import TextModel
from realera_fast.text.prompt_frame import chat_frame, cleaned
from realera_fast.text.token_words import whole_words


def section_of(pipe, reading=None):
    parts = components_of(pipe)
    texts = text_streams(parts.model, parts.text_encoders, parts.tokenizers, reading)
    return texts["sequence"][0]


@pytest.mark.parametrize(
    "prompt", ["a cat", "  a \n\t cat ", "salt &amp;amp; pepper", "&lt;cat&gt;", "", "l\u2019oie"]
)
def test_prompts_are_cleaned_as_wan_cleans_them(prompt):
    assert cleaned(prompt) == prompt_clean(prompt)
    pipe, _ = wan()
    text = section_of(pipe)
    assert text.token_ids(prompt) == text.token_ids(prompt_clean(prompt))


@pytest.mark.parametrize("name", LANGUAGE)
def test_a_prompt_stands_where_the_text_around_it_leaves_it(name):
    pipe, _ = LANGUAGE[name]()
    text = section_of(pipe)
    ids = text.tokenize(["a photo of a cat"])[0][0]
    for before, word in (("a photo of a ", "cat"), ("", "a"), ("", "a photo of a cat")):
        place = text.token_span(before, word)
        assert text.tokenizer.decode(ids[place.start : place.stop]).strip() == word
    first = text.shares(["a photo of a cat"]).nonzero()[0, 1]
    assert first == text.span("", "a photo").start
    # Where the text before it is causally encoded it is the same for all, and no text of a prompt.
    one, other = text.encode(["a photo of a cat", "the photo of a dog"])
    torch.testing.assert_close(one[:first], other[:first])
    assert not torch.allclose(one[first], other[first])


@pytest.mark.parametrize("name", ["flux2_klein", "z_image"])
def test_words_are_read_behind_what_stands_before_a_prompt(name):
    # Without a token for the beginning the first of a text is like no other.
    pipe, _ = LANGUAGE[name]()
    text = section_of(pipe)
    (word,) = text.last_rows(["cat"])
    row = text.encode(["cat"])[0, text.span("", "cat").stop - 1]
    torch.testing.assert_close(word, row, rtol=1e-4, atol=1e-5)


def test_words_of_lumina_are_read_without_its_system_prompt():
    pipe, _ = lumina2()
    text = section_of(pipe)
    family = family_of(pipe.transformer)
    ((reading,),) = family.sections
    bare = replace(family, sections=((replace(reading, instruction=""),),))
    torch.testing.assert_close(text.last_rows(["cat"]), section_of(pipe, bare).last_rows(["cat"]))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_of_flux2_is_read_on_the_side_where_the_tokenizer_puts_it(side):
    pipe, more = flux2_dev(side)
    text = section_of(pipe)
    prompts = ["a photo of a cat"]
    stock = pipe.encode_prompt(prompts, max_sequence_length=more["max_sequence_length"])[0][0]
    tokens = text.ends(prompts)[0] + 1
    ours = text.encode(prompts)[0]
    shown = stock[-tokens:] if side == "left" else stock[:tokens]
    # Positions differ, and with them the rounding of thirty layers.
    torch.testing.assert_close(ours[:tokens], shown.float(), rtol=1e-3, atol=1e-4)
    # Padding in front has not read the prompt; behind it, it has, and the denoiser sees it.
    carries = text.shares(prompts)[0] > 0
    assert bool(carries[tokens:].any()) == (side == "right")
    if side == "right":
        torch.testing.assert_close(ours, stock.float(), rtol=1e-4, atol=1e-5)


def test_words_of_a_byte_level_vocabulary_are_known():
    pipe, _ = flux2_klein()
    words = whole_words(pipe.tokenizer)
    assert {"cat", "dog", "house"} <= set(words)
    assert pipe.tokenizer.convert_ids_to_tokens(words["cat"]) == "\u0120cat"


class Says:
    """A tokenizer whose chat template makes that text of a prompt."""

    def __init__(self, text, bos_token=None):
        self.text, self.bos_token = text, bos_token

    def apply_chat_template(self, chat, tokenize, **options):
        return self.text.format(chat[-1]["content"])


def test_a_template_that_begins_the_text_needs_no_other_token():
    assert not chat_frame(Says("<s>[{}]", "<s>"), "", {}).special_tokens
    frame = chat_frame(Says("[{}]", "<s>"), "", {})
    assert frame.special_tokens and frame.around("cat") == "[cat]"


@pytest.mark.parametrize("text", ["hello", "{0} {0}"])
def test_a_template_without_the_prompt_is_refused(text):
    with pytest.raises(ValueError, match="tokenizer: its chat template does not hold the prompt"):
        chat_frame(Says(text), "", {})


def test_a_tokenizer_without_a_template_is_refused():
    tokenizer = tiny_tokenizer()
    with pytest.raises(ValueError, match="tokenizer: the CLIPTokenizer.* makes no chat"):
        TextModel(tiny_text_encoder(), tokenizer, chat={})
    with pytest.raises(ValueError, match="tokenizer: the object makes no chat"):
        chat_frame(object(), "", {})


def test_a_tokenizer_whose_template_is_shorter_than_what_is_cut_out_is_refused():
    pipe, _ = qwen_image()
    family = family_of(pipe.transformer)
    ((reading,),) = family.sections
    short = replace(family, sections=((replace(reading, instruction="user\n"),),))
    with pytest.raises(ValueError, match="tokens stand before a prompt, but the pipeline cuts 34"):
        section_of(pipe, short)


def test_broken_encodings_are_mended_where_ftfy_is(monkeypatch):
    from realera_fast.text import prompt_frame

    class Mends:
        @staticmethod
        def fix_text(text):
            return text.replace("\u00e2\u20ac\u2122", "'")

    monkeypatch.setitem(sys.modules, "ftfy", Mends)
    monkeypatch.setattr(prompt_frame.importlib.util, "find_spec", lambda name: name)
    prompt_frame._mender.cache_clear()
    try:
        assert cleaned("l\u00e2\u20ac\u2122oie ") == "l'oie"
    finally:
        monkeypatch.undo()
        prompt_frame._mender.cache_clear()
