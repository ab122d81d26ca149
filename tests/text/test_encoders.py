"""Text encoder and tokenizer as one thing."""

import pytest
import torch
from tiny_families import FAMILIES, t5, t5_tokenizer
from tiny_models import aligned, tiny_text_encoder, tiny_tokenizer
from transformers import T5EncoderModel

from realera_fast.models import components_of, text_streams
from realera_fast.text import TextModel
from realera_fast.text.encoders import find_tokenizer


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


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl", "sd3", "flux", "pixart_sigma"])
def test_last_rows_are_those_of_whole_prompts(family):
    """Read without padding or with it: prompts of several lengths, one cut, one empty."""
    pipe = FAMILIES[family]()
    parts = components_of(pipe)
    streams = text_streams(parts.model, parts.text_encoders, parts.tokenizers)
    prompts = ["a photo of a cat", "", "dog", "a photo of a van gogh", "cat " * 100]
    for text in (text for sections in streams.values() for text in sections):
        whole = text.encode(prompts)
        expected = whole[torch.arange(len(prompts)), torch.tensor(text.ends(prompts))]
        torch.testing.assert_close(text.last_rows(prompts), expected, atol=1e-5, rtol=1e-5)
        assert text.last_rows([]).shape == (0, text.width)


def test_words_are_read_without_the_instruction():
    pipe = FAMILIES["sana"]()
    parts = components_of(pipe)
    (text,) = text_streams(parts.model, parts.text_encoders, parts.tokenizers)["sequence"]
    bare = TextModel(pipe.text_encoder, pipe.tokenizer, masked=True, max_tokens=text.rows)
    prompts = ["a photo of a cat", "dog"]
    assert text._frame.before and not bare._frame.before
    torch.testing.assert_close(text.last_rows(prompts), bare.last_rows(prompts))
    assert not torch.allclose(text.encode(prompts)[:, 1:4], bare.encode(prompts)[:, 1:4])


def test_reading_last_rows_puts_the_mode_back(text):
    text.encoder.train()
    assert torch.equal(text.last_rows(["cat"]), text.last_rows(["cat"]))
    assert text.encoder.training
    text.encoder.eval()


def test_parameters_per_token_leave_the_tables_out(text):
    tables = ("token_embedding", "position_embedding")
    own = [p for n, p in text.encoder.named_parameters() if not any(t in n for t in tables)]
    assert text.parameters_per_token == sum(p.numel() for p in own)
    assert text.input_embeddings is text.encoder.get_input_embeddings().weight


def test_overflow_says_what_is_cut():
    text = TextModel(tiny_text_encoder(), tiny_tokenizer(length=6))
    assert text.overflow("a cat") == ""
    assert text.overflow("a photo of a cat dog") == "cat dog"


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


def byte_level_tokenizer(words=("cat", "dog", "photo")):
    """A tokenizer of byte-level byte-pair encoding with whole words, as Qwen's and Mistral's."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate(letters)}
    merges = []
    for word in words:
        parts = list(f"\u0120{word}")
        while len(parts) > 1:
            pair = (parts[0], parts[1])
            parts[:2] = ["".join(pair)]
            if pair not in merges:
                merges.append(pair)
            vocabulary.setdefault(parts[0], len(vocabulary))
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>", model_max_length=16
    )


def language_model(head: bool):
    """A two-layer Gemma with or without its head, of the same weights."""
    from transformers import Gemma2Config, Gemma2ForCausalLM, Gemma2Model

    config = Gemma2Config(
        vocab_size=300,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        query_pre_attn_scalar=16,
        sliding_window=64,
    )
    torch.manual_seed(0)
    whole = Gemma2ForCausalLM(config).eval()
    if head:
        return whole
    plain = Gemma2Model(config).eval()
    plain.load_state_dict(whole.model.state_dict())
    return plain


def test_a_language_model_with_its_head_gives_states_not_logits():
    tokenizer = byte_level_tokenizer()
    with_head, plain = (TextModel(language_model(head), tokenizer) for head in (True, False))
    prompts = ["a photo of a cat", "A dog"]
    assert with_head.width == plain.width == 48
    assert torch.equal(with_head.encode(prompts), plain.encode(prompts))


def test_the_width_is_that_of_the_text_where_a_model_sees_pictures_too():
    encoder = language_model(False)
    text = encoder.config

    class Whole(type(text)):
        """As the configuration of a vision-language model: that of the text is inside of it."""

        def get_text_config(self, **_):
            return text

        def __getattribute__(self, name):
            if name == "hidden_size":
                raise AttributeError(name)
            return super().__getattribute__(name)

    encoder.config = Whole()
    assert TextModel(encoder, byte_level_tokenizer()).width == 48


def test_no_text_is_prepared_twice(monkeypatch):
    text = TextModel(t5(16, seed=0, dtype=torch.float32), t5_tokenizer())
    seen: list[str] = []
    prepared = text._prepared
    monkeypatch.setattr(
        text, "_prepared", lambda given: seen.append(given) or prepared(given) + "!"
    )
    for ask in (text.token_ids, text.name_key, text.control_token, text.unknown, text.overflow):
        seen.clear()
        ask("cat")
        assert seen == ["cat"], ask


@pytest.mark.parametrize("family", ["sd1", "pixart_sigma", "sana"])
@pytest.mark.parametrize("prompts", [["a photo of a cat", "cat"], [""], ["a cat " * 200]])
def test_visible_rows_are_those_of_the_whole_encoding(family, prompts):
    pipe = FAMILIES[family]()
    parts = components_of(pipe)
    (text,) = text_streams(parts.model, parts.text_encoders, parts.tokenizers)["sequence"]
    whole, visible = text.encode(prompts), text.encode_visible(prompts)
    seen = text.shares(prompts) > 0
    assert visible.shape == whole.shape and visible.isfinite().all()
    torch.testing.assert_close(visible[seen], whole[seen], rtol=1e-4, atol=1e-5)
