"""Where words lie, and the lines between neighbors and others."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_text_encoder, tiny_tokenizer
from torch.nn.functional import cosine_similarity

from realera_fast.mining import read_known_words
from realera_fast.mining.line import calibrate, labelled_pairs, words_of
from realera_fast.mining.word_space import WordSpace
from realera_fast.text import Lexicon, TextModel, TokenWords

F64 = torch.float64


def random_space(width=6):
    generator = torch.Generator().manual_seed(1)
    root = torch.randn(width, width, dtype=F64, generator=generator)
    return WordSpace(torch.randn(width, dtype=F64, generator=generator), root @ root.mT), root


def test_cosines_are_those_of_what_is_written():
    space, root = random_space()
    x, y = torch.randn(2, 5, 6, dtype=F64, generator=torch.Generator().manual_seed(2))
    seen = [(part - space.mean) @ root for part in (x, y)]
    expected = cosine_similarity(seen[0][:, None], seen[1][None], dim=-1)
    torch.testing.assert_close(space.cosines(x, y), expected)
    torch.testing.assert_close(space.pairwise(x, y), expected.diagonal())
    torch.testing.assert_close(space.lengths(x), seen[0].norm(dim=1))
    assert space.cosines(x[:0], y).shape == (0, 5)


def test_the_mean_word_is_like_no_other():
    space, _ = random_space()
    rows = torch.stack([space.mean, torch.ones(6, dtype=F64)])
    cosines = space.cosines(rows, rows)
    assert not cosines[0].any() and cosines[1, 1] == pytest.approx(1.0)


def test_shares_of_a_way():
    space = WordSpace(torch.zeros(2, dtype=F64), torch.diag(torch.tensor([1.0, 4.0], dtype=F64)))
    way = torch.tensor([[1.0, 1.0], [0.0, 2.0]], dtype=F64)
    assert space.shares(0.25 * way, way).tolist() == pytest.approx([0.25, 0.25])
    assert space.shares(torch.zeros_like(way), way).tolist() == [0.0, 0.0]
    assert space.sizes(way).tolist() == pytest.approx([5**0.5, 4.0])


def tokens(words):
    lexicon = Lexicon.load()
    known = tuple("lemma" if lexicon.has(w) else "name" for w in words)
    return TokenWords(tuple(words), tuple(range(len(words))), known, 1.0, False)


def test_pairs_are_what_the_lexicon_says_they_are():
    lexicon = Lexicon.load()
    words = ["car", "cars", "automobile", "truck", "dog", "wolf", "cat", "cup", "bowl", "qqq"]
    pairs = labelled_pairs(tokens(words), words[:-1], lexicon)
    assert ("car", "cars") in pairs["inflections"]
    assert {("car", "automobile"), ("automobile", "car")} <= set(pairs["synonyms"])
    assert ("car", "truck") in pairs["siblings"]
    assert all(a != b for part in pairs.values() for a, b in part)
    assert set(words_of(pairs)) <= set(words) - {"qqq"}
    assert pairs == labelled_pairs(tokens(words), words[:-1], lexicon)


def test_the_line_lets_few_siblings_and_few_strangers_in():
    """100 pairs of siblings at cosines 0 to 0.99, strangers at 0: two and one in a hundred pass."""
    space = WordSpace(torch.zeros(2, dtype=F64), torch.eye(2, dtype=F64))
    cosines = torch.arange(100) / 100
    names = [f"s{i}" for i in range(100)]
    rows = torch.stack([cosines, (1 - cosines.square()).sqrt()], dim=1)
    rows = torch.cat([rows, torch.tensor([[1.0, 0.0], [0.0, 1.0]])])
    words = [*names, "name", "other"]
    pairs = {
        "inflections": [("name", "s99")],
        "synonyms": [("name", "s99"), ("name", "s50")],
        "siblings": [("name", word) for word in names],
        "strangers": [("name", "other")] * 100,
    }
    line = calibrate(space, rows, words, pairs)
    assert line.source == "lexicon" and line.pairs["siblings"] == 100
    assert 0.96 < line.unknown < 0.98 and line.related == pytest.approx(0.0, abs=1e-6)
    assert line.rates["siblings"] == pytest.approx(0.02)
    assert line.rates["synonyms"] == 0.5 and line.rates["inflections"] == 1.0
    assert line.to_dict()["source"] == "lexicon"


def test_few_known_words_are_told_apart_by_their_own_distances():
    """Ten meanings of three words each, apart; the line lies between them."""
    generator = torch.Generator().manual_seed(3)
    centers = torch.eye(10, dtype=F64).repeat_interleave(3, dim=0)
    rows = centers + 0.1 * torch.randn(30, 10, dtype=F64, generator=generator)
    rows = torch.cat([rows, torch.randn(30, 10, dtype=F64, generator=generator)])
    space = WordSpace(torch.zeros(10, dtype=F64), torch.eye(10, dtype=F64))
    words = [f"w{i}" for i in range(60)]
    line = calibrate(space, rows, words, {"siblings": [], "strangers": []})
    assert line.source == "vocabulary"
    cosines = space.cosines(rows[:30], rows[:30])
    same = torch.block_diag(*[torch.ones(3, 3)] * 10).bool()
    assert float(cosines[same].min()) > line.unknown > float(cosines[~same].max())


@pytest.mark.parametrize("count", [0, 1, 2])
def test_hardly_any_words_have_no_neighbors(count):
    space = WordSpace(torch.zeros(3, dtype=F64), torch.eye(3, dtype=F64))
    line = calibrate(space, torch.ones(count, 3), ["a", "b"][:count], {"siblings": []})
    assert line.unknown == line.related == 1.0


def test_what_was_read_is_kept_for_one_lexicon(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.cached_assets_path", lambda *_: tmp_path)
    text = TextModel(tiny_text_encoder(), tiny_tokenizer())
    gram = torch.eye(text.width).double()
    first = read_known_words(text, gram)
    assert len(list(tmp_path.iterdir())) == 1
    with monkeypatch.context() as patch:
        patch.setattr(text, "last_rows", None)
        assert torch.equal(read_known_words(text, gram).read.rows, first.read.rows)
    monkeypatch.setattr("realera_fast.mining.known_words._lexicon_hash", lambda: "another")
    read_known_words(text, gram)
    assert len(list(tmp_path.iterdir())) == 2
