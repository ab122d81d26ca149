"""Texts of users: what is cleaned, what is refused, what people call the same."""

from __future__ import annotations

import unicodedata

import numpy as np
import pytest

from realera_fast.names import clean, clean_names, folded, listed, valid, valid_texts


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("  Van \t Gogh\n", "Van Gogh"),
        ("polar\u2028bear", "polar bear"),
        ("polar\u00a0bear", "polar bear"),
        (unicodedata.normalize("NFD", "crème brûlée"), "crème brûlée"),
        (unicodedata.normalize("NFD", "토끼"), "토끼"),
        (np.str_("cat"), "cat"),
        ("\U0001f469\u200d\U0001f680", "\U0001f469\u200d\U0001f680"),  # an astronaut, joined
        ("\u2764\ufe0f\u200d\U0001f525", "\u2764\ufe0f\u200d\U0001f525"),  # a heart on fire
        ("\u06af\u0631\u0628\u0647\u200c\u0647\u0627",) * 2,  # cats, in Persian
        ("\u0915\u094d\u200d\u0937",) * 2,  # a conjunct of Devanagari, half of it
        ("\U0001f3f4\U000e0067\U000e0062\U000e007f",) * 2,  # a flag, spelled in tags
        ("C++", "C++"),
        ("!", "!"),
    ],
)
def test_names_are_kept_as_they_look(given: str, kept: str) -> None:
    assert clean(given, "name") == kept and type(clean(given, "name")) is str


@pytest.mark.parametrize(
    "character",
    "\0\x01\x07\x08\x1b\x7f\x80\x9f\u00ad\u034f\u061c\u115f\u1160\u3164\uffa0\u200b\u200c\u200d"
    "\u200e\u200f\u202a\u202e\u2060\u2064\u2066\u2069\ufeff\ufff9\ufffd\U000e0001\U000e0041",
)
def test_what_nobody_sees_is_refused_by_its_name_and_place(character: str) -> None:
    for text, place in ((f"ca{character}t", 3), (f"{character}cat", 1), (f"a cat{character}", 6)):
        told = rf"anchor: .*U\+{ord(character):04X}.*at position {place};"
        with pytest.raises(ValueError, match=told) as caught:
            clean(text, "anchor")
        str(caught.value).encode()


@pytest.mark.parametrize("half", ["\ud83d", "\udce9", "\udfff"])
def test_half_a_character_is_no_text(half: str) -> None:
    for check in (clean, valid):
        with pytest.raises(ValueError, match="prompts: .*is not valid text.*position 4") as caught:
            check(f"caf{half}", "prompts")
        str(caught.value).encode()


def test_what_people_call_the_same() -> None:
    for one, other in (
        ("Cat", "CAT"),
        ("caf\u00e9", "CAFE\u0301"),
        ("\uff43\uff41\uff54", "cat"),
        ("polar  bear", "Polar\u2003bear"),
        ("Stra\u00dfe", "STRASSE"),
    ):
        assert folded(one) == folded(other)
    assert folded("cat") != folded("cats") and folded("cafe") != folded("caf\u00e9")


def test_arguments_that_take_several() -> None:
    assert listed(None, "x") == ()
    assert listed(iter([1, 2]), "x") == (1, 2)
    assert listed({"b", "a", "c"}, "x") == ("a", "b", "c")
    assert clean_names(np.array(["a", " b "]), "x") == ("a", "b")
    assert valid_texts(["a  b"], "x") == ("a  b",)
    for wrong in ("ab", b"ab", {"a": 1}, 3, np.array("ab")):
        with pytest.raises(TypeError, match="x: expected a list of strings"):
            listed(wrong, "x")
    with pytest.raises(TypeError, match="x must be a string, got int"):
        clean_names(["a", 3], "x")
    with pytest.raises(ValueError, match="x: expected non-empty strings"):
        clean_names([" "], "x")
