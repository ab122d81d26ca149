"""Text encoder and tokenizer as one thing."""

import pytest
import torch
from tiny_families import FAMILIES, t5, t5_tokenizer
from tiny_models import WORDS, aligned, tiny_text_encoder, tiny_tokenizer
from transformers import T5EncoderModel

from realera_fast.text import TextModel, find_tokenizer


@pytest.fixture(scope="module")
def text():
    return TextModel(tiny_text_encoder(), tiny_tokenizer())


def test_encodes_as_the_pipeline_does(text):
    prompts = ["a photo of a cat", "dog"]
    ids = text.tokenizer(
        prompts, padding="max_length", max_length=77, return_tensors="pt"
    ).input_ids
    with torch.no_grad():
        expected = text.encoder(ids)[0]
    assert torch.equal(text.encode(prompts), expected)
    assert torch.equal(text.encode(prompts, batch_size=1)[0], text.encode(prompts[:1])[0])


def test_encoding_nothing_and_training_mode(text):
    assert text.encode([]).shape == (0, 77, 32)
    text.encoder.train()
    text.encode(["cat"])
    assert text.encoder.training
    text.encoder.eval()


def test_overflow_says_what_is_cut():
    text = TextModel(tiny_text_encoder(), tiny_tokenizer(length=6))
    assert text.overflow("a cat") == ""
    assert text.overflow("a photo of a cat dog") == "cat dog"


def test_words_are_whole_words_most_common_first(text):
    words = text.words(100)
    assert set(words) <= set(WORDS) and {"cat", "style"} <= set(words)
    assert "of" not in words  # shorter than three letters
    assert text.words(3) == words[:3]


def test_tokenizer_is_found_beside_the_encoder(tmp_path, text):
    text.encoder.save_pretrained(tmp_path / "text_encoder")
    text.tokenizer.save_pretrained(tmp_path / "tokenizer")
    encoder = aligned(type(text.encoder).from_pretrained(tmp_path / "text_encoder"))
    found = TextModel(encoder)
    assert torch.equal(found.encode(["a photo of a cat"]), text.encode(["a photo of a cat"]))


def loaded(folder, encoder, tokenizer):
    """The encoder as it comes back from a pipeline's folder."""
    encoder.save_pretrained(folder / "text_encoder")
    tokenizer.save_pretrained(folder / "tokenizer")
    return type(encoder).from_pretrained(folder / "text_encoder")


def test_a_tokenizer_without_the_words_added_since_is_refused(tmp_path):
    tokenizer = tiny_tokenizer()
    encoder = loaded(tmp_path, tiny_text_encoder(tokenizer=tokenizer), tokenizer)
    assert len(find_tokenizer(encoder)) == len(tokenizer)
    tokenizer.add_tokens("<bun>")
    encoder.resize_token_embeddings(len(tokenizer))
    with pytest.raises(ValueError, match=r"may not know.*tokenizer=pipe\.tokenizer"):
        TextModel(encoder)
    assert TextModel(encoder, tokenizer).token_ids("<bun>") == [len(tokenizer) - 1]
    # Saved together they belong together again.
    both = loaded(tmp_path / "again", encoder, tokenizer)
    assert TextModel(both).token_ids("<bun>") == [len(tokenizer) - 1]


def test_a_word_that_the_encoder_does_not_know_is_refused():
    tokenizer = tiny_tokenizer()
    encoder = tiny_text_encoder(tokenizer=tokenizer)
    tokenizer.add_tokens("<bun>")
    with pytest.raises(ValueError, match=r"tokenizer: 'a <bun>' has token \d+, the text"):
        TextModel(encoder, tokenizer).name_key("a <bun>")


def test_rows_that_pad_the_table_are_no_words(tmp_path):
    tokenizer = t5_tokenizer()
    config = t5(16, seed=0, dtype=torch.float32).config
    config.vocab_size = len(tokenizer) + 28
    encoder = loaded(tmp_path, T5EncoderModel(config), tokenizer)
    assert encoder.get_input_embeddings().num_embeddings == len(tokenizer) + 28
    assert TextModel(encoder).token_ids("cat") == tokenizer("cat").input_ids[:-1]
    # Diffusers cuts the padding when it adds a word.
    encoder.resize_token_embeddings(len(tokenizer) + 1)
    with pytest.raises(ValueError, match="may not know"):
        TextModel(encoder)


def test_the_second_encoder_has_the_second_tokenizer(tmp_path):
    FAMILIES["flux"]().save_pretrained(tmp_path)
    loaded = T5EncoderModel.from_pretrained(tmp_path / "text_encoder_2")
    assert TextModel(loaded).token_ids("cat") == t5_tokenizer()("cat").input_ids[:-1]


def test_a_character_to_pad_with_is_no_control_token():
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = "!"
    text = TextModel(tiny_text_encoder(), tokenizer)
    assert text.control_token("yahoo!") is None
    assert text.control_token("a <|endoftext|>") == "<|endoftext|>"


def test_a_missing_tokenizer_says_what_to_pass(text):
    with pytest.raises(ValueError, match=r"pass tokenizer=pipe\.tokenizer"):
        find_tokenizer(tiny_text_encoder())


@pytest.mark.parametrize(
    ("encoder", "tokenizer", "message"),
    [
        (lambda: (1, 2), lambda: None, "text_encoder: expected one"),
        (lambda: "clip", lambda: None, "text_encoder: expected a transformers text model"),
        (tiny_text_encoder, lambda: 3, "tokenizer: expected a transformers tokenizer"),
    ],
)
def test_wrong_types_are_named(encoder, tokenizer, message):
    with pytest.raises(TypeError, match=message):
        TextModel(encoder(), tokenizer())


def test_meta_and_nan_weights_are_refused():
    with pytest.raises(ValueError, match="meta device"):
        TextModel(tiny_text_encoder().to("meta"), tiny_tokenizer())
    broken = tiny_text_encoder()
    with torch.no_grad():
        next(broken.parameters()).fill_(float("nan"))
    with pytest.raises(ValueError, match="NaN or Inf"):
        TextModel(broken, tiny_tokenizer()).encode(["cat"])


def test_fingerprint_follows_the_weights(text):
    other = TextModel(tiny_text_encoder(seed=9), tiny_tokenizer())
    assert text.fingerprint() == TextModel(tiny_text_encoder(), tiny_tokenizer()).fingerprint()
    assert text.fingerprint() != other.fingerprint()
