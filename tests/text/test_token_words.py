"""Words among the tokens of a tokenizer: CLIP's own, small ones, and those of other languages."""

from __future__ import annotations

import itertools
import json
import time
from pathlib import Path

import pytest
from clip_vocabulary import clip_tokenizer
from tiny_models import tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from realera_fast.text import Lexicon, TokenWords, read_token_words
from realera_fast.text.token_words import whole_words

LISTS = Path(__file__).parents[1] / "mining" / "data" / "expected_candidates.json"


@pytest.fixture(scope="module")
def lexicon() -> Lexicon:
    return Lexicon.load()


@pytest.fixture(scope="module")
def clip(lexicon: Lexicon) -> TokenWords:
    return read_token_words(clip_tokenizer(), lexicon)


def test_endings_are_no_words(clip: TokenWords) -> None:
    endings = set(json.loads(LISTS.read_text(encoding="utf-8"))["endings"])
    assert len(endings) > 80
    assert endings <= set(whole_words(clip_tokenizer())), "not an ending of this tokenizer"
    assert not endings & set(clip.words)


@pytest.mark.parametrize(
    "word",
    ["cat", "cats", "kitten", "feline", "doggo", "gato", "potus", "snoopy", "airplane", "knives"]
    + ["elon", "obama", "kanye", "beyonce", "pikachu", "banksy", "adidas", "spacex"]
    + ["realdonaldtrump", "barackobama", "vangogh", "elonmusk", "catsofinstagram", "🐶"],
)
def test_words_names_and_handles_are_words(clip: TokenWords, word: str) -> None:
    assert word in clip.words


def test_what_is_said_of_clips_words(clip: TokenWords) -> None:
    assert clip.sifted and 0.6 < clip.known_share < 0.65
    assert len(clip.words) == len(set(clip.words)) == len(clip.ids) == len(clip.known)
    assert list(clip.ids) == sorted(clip.ids)
    known = dict(zip(clip.words, clip.known, strict=True))
    assert (known["cat"], known["cats"], known["obama"]) == ("lemma", "inflection", "name")
    vocabulary = clip_tokenizer().get_vocab()
    assert all(
        vocabulary[f"{w}</w>"] == i
        for w, i in zip(clip.words, clip.ids, strict=True)
        if w.isascii()
    )


def test_clips_words_are_found_in_seconds(lexicon: Lexicon) -> None:
    tokenizer = clip_tokenizer()
    before = time.process_time()
    read_token_words(tokenizer, lexicon)
    assert time.process_time() - before < 6


def test_a_small_vocabulary_is_taken_whole(lexicon: Lexicon) -> None:
    """A tokenizer of a few hundred words may have some that no lexicon has."""
    words = ("cat", "doggo", "zorp", "tion", "sword", "ments", "quixel")
    found = read_token_words(tiny_tokenizer(words), lexicon)
    assert not found.sifted and set(words) <= set(found.words)


def made_of(tokens: list[str], mark: str) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words that are marked at their beginning, and of single letters."""
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    vocabulary = {token: i for i, token in enumerate(["<unk>", *letters, *tokens])}
    plain = Tokenizer(models.WordPiece(vocabulary, unk_token="<unk>", continuing_subword_prefix=""))
    plain.pre_tokenizer = pre_tokenizers.Metaspace(replacement=mark)
    plain.decoder = decoders.Metaspace(replacement=mark)
    return PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="<unk>")


@pytest.mark.parametrize("mark", ["\u2581", "\u0120"])
def test_marks_at_the_beginning_are_read(lexicon: Lexicon, mark: str) -> None:
    found = read_token_words(
        made_of([f"{mark}cat", "tion", f"{mark}an", f"{mark}houses"], mark), lexicon
    )
    assert found.words == ("cat", "houses") and found.known == ("lemma", "inflection")


def test_another_language_is_taken_whole(lexicon: Lexicon) -> None:
    """The lexicon knows too few of its words to say which are none."""
    syllables = ["ba", "ke", "lo", "mu", "ni", "po", "ru", "sa", "ti", "vu", "wo", "zy"]
    stems = ["".join(three) for three in itertools.product(syllables, repeat=3)]
    words = [f"{stem}{end}" for stem in stems for end in ("", "sch", "\u00e9")]
    words = list(dict.fromkeys([*words, "猫", "кошка", "日本"]))
    found = read_token_words(made_of([f"\u2581{w}" for w in words], "\u2581"), lexicon)
    assert len(found.words) == len(words) and not found.sifted and found.known_share < 0.3
    assert {"猫", "кошка", "日本"} <= set(found.words)


def test_no_marks_no_words(lexicon: Lexicon) -> None:
    found = read_token_words(made_of(["cat", "dog"], "\u2581"), lexicon)
    assert found == TokenWords((), (), (), 0.0, False)


def test_pieces_of_letters_are_no_words(lexicon: Lexicon) -> None:
    tokens = [
        f"\u2581{t}"
        for t in ("an", "x", "ab1", "caf\u00e9", "\ufffd", "--", "''", "st.", "😀", "ा")
    ]
    assert read_token_words(made_of(tokens, "\u2581"), lexicon).words == ("caf\u00e9", "😀")
