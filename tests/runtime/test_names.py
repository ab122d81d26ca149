"""Texts of users: what is cleaned, what is refused, what people call the same."""

from __future__ import annotations

import re
import unicodedata

import numpy as np
import pytest

from realera_fast.runtime import clean, clean_names, folded, listed, valid, valid_texts


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
        ("#\ufe0f\u20e3 7\ufe0e\u20e3",) * 2,  # keys of a telephone
        ("\u00a9\ufe0f \u203c\ufe0f \u2139\ufe0f \u3030\ufe0f \u2194\ufe0f",) * 2,
        ("\U0001f3f3\ufe0f\u200d\U0001f308",) * 2,  # a rainbow flag
        ("\u8fbb\U000e0100 \u795e\ufe00 \u3007\ufe00",) * 2,  # forms of Chinese characters
        ("\u1820\u180b\u182d\u180e\u1820",) * 2,  # forms of Mongolian letters
        ("\u1000\ufe00",) * 2,  # a Burmese letter with a dot, for Khamti
        ("C++", "C++"),
        ("!", "!"),
    ],
)
def test_names_are_kept_as_they_look(given: str, kept: str) -> None:
    assert clean(given, "name") == kept and type(clean(given, "name")) is str


@pytest.mark.parametrize(
    "character",
    "\0\x01\x07\x08\x1b\x7f\x80\x9f\u00ad\u034f\u061c\u115f\u1160\u3164\uffa0\u200b\u200c\u200d"
    "\u200e\u200f\u202a\u202e\u2060\u2064\u2066\u2069\ufeff\ufff9\ufffd\U000e0001\U000e0041"
    "\ufe00\ufe0e\ufe0f\U000e0100\U000e01ef\u180b\u180d\u180e\u180f\u17b4\u17b5\u2800\ufffc"
    "\U0001d159\U0001d173\U0001bca0\U00013430\U00013441\U00016fe4\ue000\uf8ff\U000f0000\U00100000"
    "\ufdd0\uffff\U0001fffe\u0378\U000e0200\ufff0",
)
def test_what_nobody_sees_is_refused_by_its_name_and_place(character: str) -> None:
    for text, place in ((f"ca{character}t", 3), (f"{character}cat", 1), (f"a cat{character}", 6)):
        told = rf"anchor: .*U\+{ord(character):04X}.*at position {place};"
        with pytest.raises(ValueError, match=told) as caught:
            clean(text, "anchor")
        str(caught.value).encode()


@pytest.mark.parametrize(
    "text",
    [
        *("caf\u00e9\ufe0f", "\u0431\ufe0f", "911\ufe0f", "C+\ufe0f", "!\ufe0f", "\u3042\ufe0f"),
        *("\u1820\U000e0100", "\u2764\U000e0100", "\u2764\u180b", "\u8fbb\u180b"),
        "\u2764\ufe0f\ufe0f",
        *("\U0001f469\u200d\u200d\U0001f680", "\uff43\u200d\uff41", "\u0915\u094d\u200d"),
    ],
)
def test_what_means_something_elsewhere_is_refused_where_nobody_sees_it(text: str) -> None:
    with pytest.raises(ValueError, match="name: .*a character nobody sees"):
        clean(text, "name")


def test_everything_that_is_drawn_is_kept_and_all_else_is_told() -> None:
    for code in range(0x110000):
        character = chr(code)
        category = unicodedata.category(character)
        if category in ("Co", "Cn") and code % 251:
            continue  # almost all of Unicode is of these two
        if category[0] == "C" and category != "Cs" and not character.isspace():
            with pytest.raises(ValueError, match=f"U\\+{code:04X}"):
                clean(f"a{character}", "name")
        elif category[0] in "LNPS" and unicodedata.is_normalized("NFC", character):
            name = unicodedata.name(character, "")
            blank = re.search("FILLER|BLANK|NULL NOTEHEAD|REPLACEMENT", name)
            if blank and "SYMBOL FOR" not in name:
                continue
            assert clean(f"a{character}", "name") == f"a{character}"


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
