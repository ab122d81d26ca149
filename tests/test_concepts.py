"""Concepts: shorthand, defaults, and every way to write them wrongly."""

import pytest

from realera_fast.concepts import Concept, parse_concept, parse_concepts


def test_shorthand_names_an_anchor():
    assert parse_concept("Van Gogh=art") == Concept("Van Gogh", "art")
    assert parse_concept("Van Gogh") == Concept("Van Gogh")
    assert parse_concept("cat=").destination == ""
    assert parse_concept("a=b=c") == Concept("a", "b=c")


def test_anchor_follows_the_kind():
    assert Concept("cat").destination is None and Concept("cat").anchor_name == "the mean word"
    assert Concept("cat", anchor="").destination == ""
    assert Concept("mosaic", kind="style").destination == "art"
    assert Concept("Ada", kind="person").destination == "a person"
    assert Concept("mosaic", anchor="photo", kind="style").destination == "photo"


def test_white_space_is_folded():
    concept = Concept("  Van   Gogh ", synonyms=("Vincent  van Gogh",))
    assert concept.words == ("Van Gogh", "Vincent van Gogh")


def test_mixed_lists_and_single_values():
    mixed = parse_concepts(["cat=dog", Concept("ship")])
    assert [c.target for c in mixed] == ["cat", "ship"]
    assert parse_concepts("cat") == parse_concepts(["cat"]) == (Concept("cat"),)
    assert parse_concepts([]) == ()


def test_round_trip():
    concept = Concept("cat", "dog", "object", ("kitten",))
    assert Concept.from_dict(concept.to_dict()) == concept
    with pytest.raises(ValueError, match="fields target"):
        Concept.from_dict({"target": "cat", "color": "black"})


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Concept(""), ValueError, "target is empty"),
        (lambda: Concept("  "), ValueError, "target is empty"),
        (lambda: Concept("cat", synonyms=("",)), ValueError, "synonyms is empty"),
        (lambda: Concept("cat", "Cat"), ValueError, "equals its anchor"),
        (lambda: Concept("cat", "dog", synonyms=("Dog",)), ValueError, "equals its anchor"),
        (lambda: Concept("art", kind="style"), ValueError, "equals its anchor"),
        (lambda: Concept("cat", synonyms=("CAT",)), ValueError, "twice"),
        (lambda: Concept("cat", kind="animal"), ValueError, "must be one of"),
        (lambda: Concept(3), TypeError, "must be a string"),
        (lambda: Concept("cat", 3), TypeError, "must be a string"),
        (lambda: Concept("cat", synonyms="kitten"), TypeError, "synonyms="),
        (lambda: parse_concepts([3]), TypeError, "a string or a Concept"),
        (lambda: parse_concepts(["cat", "Cat"]), ValueError, "named twice"),
        (lambda: parse_concepts(["cat"], preserve=["CAT"]), ValueError, "also to be erased"),
        (lambda: parse_concepts(["cat"], preserve=[""]), ValueError, "non-empty"),
        (lambda: parse_concepts(["cat=dog", "dog"]), ValueError, "itself erased"),
    ],
)
def test_bad_input_is_named(make, error, message):
    with pytest.raises(error, match=message):
        make()
