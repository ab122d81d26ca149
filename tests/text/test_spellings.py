"""Which names are the same is what the tokenizers of all text encoders say."""

from __future__ import annotations

from typing import Any

import pytest
from tiny_families import FAMILIES

import realera_fast
from realera_fast import Concept, EraseConfig

CONFIG = EraseConfig.from_dict(
    {
        "alignment": {"enabled": False},
        "vocabulary": {"words": 6, "cache": False},
        "pairs": {"context_words": 2, "neutral_words": 4},
        "mining": {"mode": "none"},
    }
)


def run(family: str, concepts: Any, **options: Any) -> realera_fast.Erasure:
    pipe = FAMILIES[family]()
    return realera_fast.erase(pipe, concepts, config=CONFIG, progress=False, **options)


def spelled(erasure: realera_fast.Erasure) -> list[str]:
    return [text for text in erasure.report["warnings"] if "spellings" in text]


@pytest.mark.parametrize("family", ["flux", "sd3"])
def test_both_spellings_may_be_named_where_an_encoder_tells_them_apart(family: str) -> None:
    result = run(family, [Concept("cat", anchor="dog", synonyms=("Cat", "CAT"))])
    moved = {w["word"]: w["moved"] for w in result.report["words"] if w["moved"] is not None}
    assert moved["cat"] > 0 and moved["Cat"] > 0 and moved["CAT"] > 0
    assert not spelled(result)


def test_spellings_that_nobody_named_are_warned_of() -> None:
    result = run("flux", ["Van Gogh=art", "cat"], preserve=["Cat"])
    (text,) = spelled(result)
    # "Cat" was named, if only to be kept.
    for word in ("van gogh", "VAN GOGH", "CAT"):
        assert repr(word) in text
    assert "'Cat'" not in text and "'Van Gogh'" not in text


@pytest.mark.parametrize("family", ["sd1", "pixart_alpha"])
def test_spellings_are_the_same_where_no_encoder_tells_them_apart(family: str) -> None:
    # CLIP's tokenizer has lower case alone; PixArt's pipeline makes prompts so.
    assert not spelled(run(family, ["Cat"]))
    with pytest.raises(ValueError, match="'Cat' .*same as 'cat'.* named twice"):
        run(family, [Concept("cat", synonyms=("Cat",))])
    with pytest.raises(ValueError, match="equals its anchor"):
        run(family, ["cat=CAT"])


@pytest.mark.parametrize(
    ("family", "token"),
    [("flux", "</s>"), ("flux", "<pad>"), ("flux", "<|endoftext|>"), ("sd3", "</s>")]
    + [("pixart_alpha", "</S>"), ("sana", "<bos>"), ("sana", "<eos>"), ("sd1", "<|startoftext|>")],
)
def test_control_tokens_of_every_tokenizer_are_refused(family: str, token: str) -> None:
    for concepts, preserve in (
        ([f"cat{token}"], ()),
        ([Concept("cat", synonyms=(f"big {token} cat",))], ()),
        ([f"cat={token}"], ()),
        (["cat"], [token]),
    ):
        with pytest.raises(ValueError, match="control token"):
            run(family, concepts, preserve=preserve)


def test_what_is_a_control_token_elsewhere_is_text() -> None:
    assert run("sd1", ["a </s> cat"]).report["words"][0]["moved"] > 0


def test_names_that_an_encoder_does_not_know_are_warned_of() -> None:
    word = "\u5154\u5b50"
    for family, expected in (("pixart_alpha", 1), ("flux", 1), ("sd1", 0)):
        warnings = run(family, [word, "cat"]).report["warnings"]
        told = [text for text in warnings if "knows no such characters" in text]
        assert len(told) == expected
        assert all(repr(word) in text and "'cat'" not in text for text in told)
    # PixArt's only encoder can't tell them apart: to keep one and to erase the other is nothing.
    with pytest.raises(ValueError, match="also to be erased"):
        run("pixart_alpha", [word], preserve=["\u732b"])


def test_words_that_only_one_encoder_tells_apart_stay_in_part() -> None:
    def told(*arguments: Any, **options: Any) -> list[str]:
        return [t for t in run(*arguments, **options).report["warnings"] if "stays in part" in t]

    (text,) = told("flux", ["cat=dog"], preserve=["tree", "Cat"])
    assert "'Cat' is to stay and 'cat' to go" in text
    (text,) = told("sd3", [Concept("cat", anchor="Cat")])
    assert "'Cat' is to stay and 'cat' to go" in text
    assert not told("flux", ["cat=dog"], preserve=["tree"])
