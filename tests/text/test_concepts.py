"""Concepts: shorthand, defaults, and every way to write them wrongly."""

from collections import OrderedDict

import numpy as np
import pytest

from realera_fast.text import Concept, check_names, parse_concept, parse_concepts


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
    ("fields", "error", "message"),
    [
        ({"target": ""}, ValueError, "a name is empty"),
        ({"target": "cat", "synonyms": ["kitten", ""]}, ValueError, "a name is empty"),
        ({"target": 3}, TypeError, "Concept.target must be a string, got int"),
        ({"target": "\ud83d"}, ValueError, "Concept.target: .*not valid text"),
        ({"target": "cat", "anchor": 3}, TypeError, "Concept.anchor must be a string"),
        ({"target": "cat", "anchor": "\ud83d"}, ValueError, "Concept.anchor: .*not valid text"),
        ({"target": "cat", "kind": ["x"]}, ValueError, "Concept.kind must be one of"),
        ({"target": "cat", "synonyms": "kitten"}, TypeError, "Concept.synonyms: .*one string"),
        ({"target": "cat", "synonyms": [None]}, TypeError, "Concept.synonyms must be a string"),
    ],
)
def test_types_and_text_of_a_file_are_checked(fields, error, message):
    with pytest.raises(error, match=message):
        Concept.from_dict(fields)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Concept(""), ValueError, "target is empty"),
        (lambda: Concept("  "), ValueError, "target is empty"),
        (lambda: Concept("cat", synonyms=("",)), ValueError, "synonyms is empty"),
        (lambda: Concept("cat", " cat"), ValueError, "equals its anchor"),
        (lambda: Concept("cat", "dog", synonyms=("dog",)), ValueError, "equals its anchor"),
        (lambda: Concept("art", kind="style"), ValueError, "equals its anchor"),
        (lambda: Concept("cat", synonyms=("cat ",)), ValueError, "twice"),
        (lambda: Concept("cat", kind="animal"), ValueError, "must be one of"),
        (lambda: Concept(3), TypeError, "must be a string"),
        (lambda: Concept("cat", 3), TypeError, "must be a string"),
        (lambda: Concept("cat", synonyms="kitten"), TypeError, "synonyms="),
        (lambda: parse_concepts([3]), TypeError, "a string or a Concept"),
        (lambda: parse_concepts(["cat", "cat "]), ValueError, "named twice"),
        (lambda: parse_concepts(["cat"], preserve=[" cat"]), ValueError, "also to be erased"),
        (lambda: parse_concepts(["cat"], preserve=[""]), ValueError, "non-empty"),
        (lambda: parse_concepts(["cat=dog", "dog"]), ValueError, "itself erased"),
        (lambda: parse_concepts(["caf\u00e9", "cafe\u0301"]), ValueError, "named twice"),
        (lambda: Concept("c\u200bat"), ValueError, r"Concept.target: .*U\+200B .*position 2"),
        (lambda: Concept("cat", synonyms=["\ud83d"]), ValueError, "synonyms: .*not valid text"),
        (lambda: Concept("cat", synonyms={"kitten": 1}), TypeError, "synonyms: .*got dict"),
        (lambda: Concept("cat", synonyms=(None,)), TypeError, "synonyms must be a string"),
        (lambda: parse_concepts(None), TypeError, "got None"),
        (lambda: parse_concepts({"cat": "dog"}), TypeError, "concepts: .*got dict"),
        (lambda: parse_concepts(OrderedDict(cat="dog")), TypeError, "got OrderedDict"),
        (lambda: parse_concepts(b"cat"), TypeError, "concepts: .*got bytes"),
        (lambda: parse_concepts(7), TypeError, "concepts: .*got int"),
        (lambda: parse_concepts([["cat"]]), TypeError, "a string or a Concept, got list"),
        (lambda: parse_concepts(["cat", None]), TypeError, "a string or a Concept, got NoneType"),
        (lambda: parse_concepts(["cat"], preserve={"dog": 1}), TypeError, "preserve: .*got dict"),
        (lambda: parse_concepts(["cat"], preserve="dog"), TypeError, r"write \['dog'\]"),
        (lambda: parse_concepts(["cat"], preserve=[7]), TypeError, "preserve must be a string"),
    ],
)
def test_bad_input_is_named(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    "several",
    [
        list,
        tuple,
        iter,
        np.array,
        set,
        lambda ws: (w for w in ws),
        lambda ws: {w: 1 for w in ws}.keys(),
    ],
)
def test_several_names_may_come_in_any_form_that_has_items(several):
    names = ["a cat", "kitten"]
    concept = Concept("tabby", synonyms=several(names))
    assert concept.synonyms == ("a cat", "kitten")
    assert all(type(word) is str for word in concept.words)
    assert [c.target for c in parse_concepts(several(names))] == names
    assert parse_concepts(["dog"], preserve=several(names)) == (Concept("dog"),)


def test_none_is_no_synonym_and_nothing_to_preserve():
    assert Concept("cat", synonyms=None).synonyms == ()
    assert parse_concepts(["cat"], preserve=None) == (Concept("cat"),)
    assert Concept.from_dict({"target": "cat", "synonyms": None}) == Concept("cat")


def test_case_is_for_the_tokenizers_to_tell_apart():
    assert Concept("cat", anchor="Cat", synonyms=("CAT",)).words == ("cat", "CAT")
    assert len(parse_concepts(["cat", "Cat"], preserve=["CAT"])) == 2
    with pytest.raises(ValueError, match=r"'Cat' \(to this model the same as 'cat'\) is named twi"):
        check_names(parse_concepts(["cat", "Cat"]), key=str.lower)
    for concept, message in (
        (Concept("cat", "Cat"), "equals its anchor"),
        (Concept("cat", synonyms=("CAT",)), "named twice"),
        (Concept("dog", "CAT"), "itself erased"),
    ):
        others = (Concept("cat"),) if concept.target == "dog" else ()
        with pytest.raises(ValueError, match=message):
            check_names((concept, *others), key=str.lower)
    with pytest.raises(ValueError, match="preserve: .*also to be erased"):
        check_names((Concept("cat"),), ["Cat"], key=str.lower)


def test_names_are_kept_with_composed_accents():
    concept = Concept("cafe\u0301", anchor="the\u0301", synonyms=("cre\u0300me",))
    assert concept == Concept("caf\u00e9", "th\u00e9", synonyms=("cr\u00e8me",))
    # Whether these two are the same, a tokenizer says: `erase` refuses them then.
    assert Concept("caf\u00e9", "cafe\u0301").anchor == "caf\u00e9"
