"""Names that are hard to read: common words, parts of words, other spellings, other scripts."""

from __future__ import annotations

import pytest

from realera_fast import Concept, embedded, preview
from realera_fast.runtime import fastest_dtype


@pytest.fixture(scope="module")
def words():
    """What goes and what stays with a concept, to the embedded model, by its preview."""
    pipe = embedded.load_pipeline(fastest_dtype("cpu"))

    def of(concept):
        concept = concept if isinstance(concept, Concept) else Concept(concept)
        found = preview(pipe, [concept], progress=False)
        return set(found.neighbors[concept.target]), found

    return of


def test_a_common_word_takes_its_forms_and_no_relatives(words):
    goes, found = words("apple")
    assert {"apples", "apple's"} <= goes and not goes & {"pear", "banana", "avocado"}
    assert "pear" in found.relatives["apple"]


def test_a_brand_that_is_a_person_goes_by_its_kind(words):
    goes, found = words(Concept("prince", kind="person"))
    assert "princes" in goes and "princess" not in goes
    assert found.anchors["prince"].words[-1] == "person"


def test_a_word_inside_others_leaves_them(words):
    goes, _ = words("art")
    assert "arts" in goes
    inside = ("artichoke", "party", "heart", "earth", "smart", "cart", "start", "apart")
    assert not goes & set(inside)


@pytest.mark.parametrize(
    ("written", "goes_with_it"),
    [
        ("CAT", {"cats", "catsofinstagram"}),
        ("cats", {"cat"}),
        ("café", {"cafe", "cafés"}),
        ("jack-o'-lantern", {"jack o' lantern", "pumpkin"}),
        ("Coca-Cola", {"cocacola", "coca cola", "coke"}),
        ("van gogh", {"vangogh", "vincent van gogh"}),
        ("Donald Trump", {"realdonaldtrump", "donaldtrump"}),
    ],
)
def test_every_way_to_write_a_name_goes(words, written, goes_with_it):
    goes, _ = words(written)
    assert goes_with_it <= {word.lower() for word in goes}, goes


@pytest.mark.parametrize("written", ["\N{CJK UNIFIED IDEOGRAPH-732B}", "\N{CAT FACE}"])
def test_other_scripts_are_names_like_others(words, written):
    goes, found = words(written)
    assert not goes & {"cat", "dog"} and found.relatives[written] == ()


def test_a_name_of_twelve_words_goes_alone(words):
    name = "a very old and rather small ship with seven big white sails"
    goes, _ = words(name)
    assert all(word.startswith(name[:-1]) for word in goes), goes


def test_a_word_is_the_one_that_is_written_like_it(words):
    """A sombrero is a hat, and no island."""
    _, found = words("sombrero")
    assert not {"hawaii", "ireland", "java"} & set(found.relatives["sombrero"])
