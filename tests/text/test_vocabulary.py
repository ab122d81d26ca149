"""The preserve prior and its cache."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiny_families import FAMILIES
from tiny_models import tiny_text_encoder, tiny_tokenizer

from realera_fast.text import (
    TextModel,
    VocabularyConfig,
    encode_vocabulary,
    mean_rows,
    preserve_gram,
    preserved_words,
)
from realera_fast.text import vocabulary as module
from realera_fast.text.padding import first_row_weights


@pytest.fixture
def text(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.cached_assets_path", lambda *_: tmp_path)
    return TextModel(tiny_text_encoder(), tiny_tokenizer(length=16))


WORDS = ("cat", "kitten", "dog", "puppy", "art", "horse", "ship", "tree")


def test_gram_is_that_of_the_rows_of_all_prompts(text):
    """The first row of the padding counts for all of it."""
    prompts = [prompt.text for prompt in module._prompts(WORDS)]
    vocabulary = encode_vocabulary(text, VocabularyConfig(), words=WORDS)
    assert vocabulary.prompts == len(prompts) == 3 * 8
    expected = torch.zeros(text.width, text.width, dtype=torch.float64)
    for prompt in prompts:
        (rows,), (end,) = text.encode([prompt]).double(), text.ends([prompt])
        rest = text.max_tokens - end - 1
        weights = [0.0] + [1.0] * end + [float(rest)]
        used = rows[: end + 2]
        expected += used.mT @ (torch.tensor(weights)[:, None] * used) / (text.max_tokens - 1)
    torch.testing.assert_close(vocabulary.gram, expected, rtol=1e-5, atol=1e-5)
    assert torch.linalg.eigvalsh(vocabulary.gram)[0] > -1e-9


@pytest.mark.parametrize("prompt", ["", "cat", "cat " * 14, "cat " * 50])
def test_weights_of_first_rows_sum_to_one(text, prompt):
    (weight,), (end,) = first_row_weights(text, [prompt]), text.ends([prompt])
    assert weight.sum() == pytest.approx(1.0) and weight[0] == 0
    assert not weight[end + 2 :].any() and (weight[1 : end + 2] > 0).all()


def test_many_words_take_the_templates_in_turns():
    many = [f"word{i}" for i in range(600)]
    prompts = module._prompts(many)
    assert len(prompts) == 600 and all(w in p.used for w, p in zip(many, prompts, strict=True))
    shapes = {p.text.replace(w, "{}") for w, p in zip(many, prompts, strict=True)}
    assert {"{}", "a photo of a {}"} <= shapes and sum(len(p.used) == 2 for p in prompts) == 200


def test_padding_that_is_hidden_or_not_causal_is_read_as_it_is():
    pipe = FAMILIES["flux"]()
    text = TextModel(pipe.text_encoder_2, pipe.tokenizer_2, max_tokens=12)
    vocabulary = encode_vocabulary(text, VocabularyConfig(cache=False), words=WORDS)
    prompts = [prompt.text for prompt in module._prompts(WORDS)]
    pairs = mean_rows(text, prompts)
    rows = pairs.source.double()
    torch.testing.assert_close(vocabulary.gram, rows.mT @ (pairs.weight[:, None] * rows))


def test_excluded_words_leave_no_trace(text):
    vocabulary = encode_vocabulary(text, VocabularyConfig(), words=WORDS)
    gone = vocabulary.words[2]
    rest = [p for p in module._prompts(vocabulary.words) if gone not in p.used]
    gram, count = preserve_gram(text, vocabulary, [gone.upper()])
    assert count == len(rest) < vocabulary.prompts
    expected = module._accumulate(text, rest, progress=False, desc="") / count
    # Beside what its roundings may be, which is added so that no direction is negative.
    torch.testing.assert_close(gram, expected, rtol=1e-5, atol=1e-5)
    everything, _ = preserve_gram(text, vocabulary, [])
    assert not torch.allclose(everything, gram)
    one, _ = preserve_gram(text, vocabulary, vocabulary.words[1:])
    assert torch.linalg.eigvalsh(one)[0] > 0


def test_words_that_are_preserved_are_taken_evenly():
    assert preserved_words(WORDS, 100) == WORDS
    assert preserved_words(WORDS, 4) == WORDS[::2]
    assert preserved_words(WORDS, 0) == preserved_words((), 5) == ()


def test_nothing_at_all_is_left_without_the_last_word(text, tiles):
    """Not the rounding of what was added and taken away, which may be negative."""
    vocabulary = encode_vocabulary(
        text, VocabularyConfig(cache=False), words=WORDS[:6], progress=False
    )
    gram, count = preserve_gram(text, vocabulary, vocabulary.words)
    assert count == 0 and not gram.any() and gram.dtype == torch.float64


def test_second_run_reads_the_cache(text, tmp_path, monkeypatch):
    first = encode_vocabulary(text, VocabularyConfig(), words=WORDS)
    assert len(list(tmp_path.glob("*.safetensors"))) == 1
    monkeypatch.setattr(text, "first_rows", None)
    second = encode_vocabulary(text, VocabularyConfig(), words=WORDS)
    assert torch.equal(first.gram, second.gram) and first.words == second.words


def test_broken_cache_is_made_again(text, tmp_path):
    first = encode_vocabulary(text, VocabularyConfig(), words=WORDS)
    (path,) = tmp_path.glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:100])
    assert torch.equal(encode_vocabulary(text, VocabularyConfig(), words=WORDS).gram, first.gram)
    other = TextModel(tiny_text_encoder(seed=4), text.tokenizer)
    encode_vocabulary(other, VocabularyConfig(), words=WORDS)
    assert len(list(tmp_path.glob("*.safetensors"))) == 2


def test_unwritable_cache_costs_only_time(text, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    assert encode_vocabulary(text, VocabularyConfig(), words=WORDS[:4]).prompts == 12
    assert not list(tmp_path.iterdir())


def test_no_words_no_prior(text):
    vocabulary = encode_vocabulary(text, VocabularyConfig(), words=())
    gram, count = preserve_gram(text, vocabulary, ["cat"])
    assert vocabulary.words == () and count == 0 and not gram.any()


def test_words_left_out_are_neither_preserved_nor_there(text):
    every = encode_vocabulary(text, VocabularyConfig(), words=WORDS)
    gone = every.words[2]
    fewer = encode_vocabulary(text, VocabularyConfig(exclude=(gone.upper(),)), words=WORDS)
    assert fewer.words == tuple(w for w in every.words if w != gone)
    same = encode_vocabulary(text, VocabularyConfig(), words=fewer.words)
    torch.testing.assert_close(fewer.gram, same.gram)


def test_one_string_of_words_to_leave_out_is_refused():
    with pytest.raises(TypeError, match="exclude"):
        VocabularyConfig(exclude="cat")
    with pytest.raises(TypeError, match=r"exclude: .*got dict"):
        VocabularyConfig(exclude={"cat": 1})
    for several in (["cat"], iter(["cat"]), np.array(["cat"]), {"cat"}):
        assert VocabularyConfig(exclude=several).exclude == ("cat",)
    assert VocabularyConfig(exclude=None).exclude == ()


def test_the_cache_holds_what_safetensors_writes(text, tmp_path):
    vocabulary = encode_vocabulary(text, VocabularyConfig(), words=WORDS[:4])
    (path,) = tmp_path.glob("*.safetensors")
    tensors = {"gram": vocabulary.gram}
    save_file(tensors, tmp_path / "expected", {"prompts": "12"})
    assert path.read_bytes() == (tmp_path / "expected").read_bytes()
