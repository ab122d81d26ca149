"""The preserve prior and its cache."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiny_models import tiny_text_encoder, tiny_tokenizer

from realera_fast.text import (
    TextModel,
    VocabularyConfig,
    describe,
    encode_vocabulary,
    preserve_gram,
)
from realera_fast.text import vocabulary as module


@pytest.fixture
def text(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.cached_assets_path", lambda *_: tmp_path)
    return TextModel(tiny_text_encoder(), tiny_tokenizer(length=16))


def direct(text, prompts):
    rows = text.encode(prompts)[:, 1:].double()
    return torch.einsum("pti,ptj->ij", rows, rows) / rows.shape[1]


def test_gram_is_the_sum_over_all_prompts(text):
    vocabulary = encode_vocabulary(text, VocabularyConfig(words=8))
    prompts = [p for p, _ in module._prompts(vocabulary.words)]
    assert vocabulary.prompts == len(prompts) == 3 * 8
    torch.testing.assert_close(vocabulary.gram, direct(text, prompts), rtol=1e-12, atol=1e-12)


def test_excluded_words_leave_no_trace(text):
    vocabulary = encode_vocabulary(text, VocabularyConfig(words=8))
    gone = vocabulary.words[2]
    rest = [p for p, used in module._prompts(vocabulary.words) if gone not in used]
    gram, count = preserve_gram(text, vocabulary, [gone.upper()])
    assert count == len(rest) < vocabulary.prompts
    torch.testing.assert_close(gram, direct(text, rest) / count, rtol=1e-9, atol=1e-9)
    everything, _ = preserve_gram(text, vocabulary, [])
    assert not torch.allclose(everything, gram)


def test_nothing_at_all_is_left_without_the_last_word(text, tiles):
    """Not the rounding of what was added and taken away, which may be negative."""
    vocabulary = encode_vocabulary(text, VocabularyConfig(words=6, cache=False), progress=False)
    gram, count = preserve_gram(text, vocabulary, vocabulary.words)
    assert count == 0 and not gram.any() and gram.dtype == torch.float64


def test_second_run_reads_the_cache(text, tmp_path, monkeypatch):
    first = encode_vocabulary(text, VocabularyConfig(words=8))
    assert len(list(tmp_path.glob("*.safetensors"))) == 1
    monkeypatch.setattr(text, "encode", None)
    second = encode_vocabulary(text, VocabularyConfig(words=8))
    assert torch.equal(first.gram, second.gram) and first.words == second.words


def test_broken_cache_is_made_again(text, tmp_path):
    first = encode_vocabulary(text, VocabularyConfig(words=8))
    (path,) = tmp_path.glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:100])
    assert torch.equal(encode_vocabulary(text, VocabularyConfig(words=8)).gram, first.gram)
    other = TextModel(tiny_text_encoder(seed=4), text.tokenizer)
    encode_vocabulary(other, VocabularyConfig(words=8))
    assert len(list(tmp_path.glob("*.safetensors"))) == 2


def test_unwritable_cache_costs_only_time(text, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    assert encode_vocabulary(text, VocabularyConfig(words=4)).prompts == 12
    assert not list(tmp_path.iterdir())


def test_similarity_is_one_for_the_word_itself(text):
    vocabulary = encode_vocabulary(text, VocabularyConfig(words=8))
    scores = vocabulary.similarity(describe(text, vocabulary.words[3:4])[0])
    assert scores.argmax() == 3 and scores[3].item() == pytest.approx(1.0, rel=1e-5)


def test_no_words_no_prior(text):
    vocabulary = encode_vocabulary(text, VocabularyConfig(words=0))
    gram, count = preserve_gram(text, vocabulary, ["cat"])
    assert vocabulary.words == () and count == 0 and not gram.any()


def test_words_left_out_are_neither_preserved_nor_there(text):
    every = encode_vocabulary(text, VocabularyConfig(words=8))
    gone = every.words[2]
    fewer = encode_vocabulary(text, VocabularyConfig(words=8, exclude=(gone.upper(),)))
    assert fewer.words == tuple(w for w in every.words if w != gone)
    same = encode_vocabulary(text, VocabularyConfig(words=8), words=fewer.words)
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
    vocabulary = encode_vocabulary(text, VocabularyConfig(words=4))
    (path,) = tmp_path.glob("*.safetensors")
    tensors = {"descriptors": vocabulary.descriptors, "gram": vocabulary.gram}
    save_file(tensors, tmp_path / "expected", {"prompts": "12"})
    assert path.read_bytes() == (tmp_path / "expected").read_bytes()
