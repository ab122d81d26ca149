"""Which words follow a concept, and which must not."""

from __future__ import annotations

import math

import pytest
import torch
from known_words import known_words

from realera_fast import Concept
from realera_fast.mining import MiningConfig, choose_anchors, find_neighbors

DEFAULT = MiningConfig()


def at(cosine: float, turn: float = 0.0) -> list[float]:
    """A row at a cosine with the first axis."""
    rest = math.sqrt(1 - cosine**2)
    return [cosine, rest * math.cos(turn), rest * math.sin(turn)]


def around(tokens, concepts, config=DEFAULT, named=None, **options):
    """Neighborhoods where every name lies on the first axis."""
    named = named or {word: at(1.0) for c in concepts for word in c.words}
    return find_neighbors(known_words(tokens, named), concepts, config, **options)


def test_each_relation_has_its_own_line():
    tokens = {
        "automobile": at(0.45, 1.0),  # a synonym: above the line of what is related
        "cars": at(0.41, 2.0),  # a plural
        "auto": at(0.3, 1.0),  # a synonym that the model sees otherwise
        "jeep": at(0.41, 2.5),  # a kind of car
        "limousine": at(0.3, 2.5),  # another one, that the model sees otherwise
        "driving": at(0.61, 3.0),  # nothing is known of it, and it is near
        "garage": at(0.59, 1.5),
        "tree": at(0.1),
    }
    found = around(tokens, [Concept("car")])
    assert set(found.near["car"]) == {"automobile", "cars", "jeep", "driving"}
    assert found.sources["automobile"] == "lexicon" and found.sources["cars"] == "inflection"
    assert found.sources["driving"] == "token"
    assert found.borderline["car"] == ("garage",)
    assert found.beyond["car"] == ("garage", "tree")


def test_siblings_stay_unless_the_model_hardly_tells_them_apart():
    for cosine, goes in ((0.57, False), (0.61, True)):
        tokens = {"truck": at(cosine, 1.0), "tree": at(0.0)}
        found = around(tokens, [Concept("car")])
        assert (found.near["car"] == ("truck",)) == goes
        assert ("truck" in found.relatives["car"]) != goes


def test_what_a_thing_is_a_kind_of_stays_as_other_people_do():
    for concept, word in (
        (Concept("lollipop"), "candy"),
        (Concept("prince", kind="person"), "baronet"),
    ):
        for cosine, goes in ((0.7, False), (0.9, True)):
            found = around({word: at(cosine, 1.0), "tree": at(0.0)}, [concept])
            assert (word in found.near[concept.target]) == goes
            # A word as near as that may be another one for the thing; another person is none.
            assert (word in found.held[concept.target]) == (concept.kind == "person" and not goes)


def test_what_is_near_and_something_else_is_held():
    tokens = {
        "truck": at(0.5, 1.0),  # a sibling
        "garage": at(0.4, 2.0),  # a thing
        "tent": at(0.3, 2.0),
        "cars": at(0.5, 1.5),  # goes
        "engine": at(0.57, 1.5),  # in doubt
        "tree": at(-0.1),  # far
    }
    found = around(tokens, [Concept("car")])
    assert found.held["car"] == ("truck", "garage", "tent")
    few = around(tokens, [Concept("car")], MiningConfig(relative_words=1))
    assert few.held["car"] == ("truck",)
    # Who leaves with another concept is held by none.
    named = {"car": at(1.0), "truck": at(0.5, 1.0)}
    both = around(tokens, [Concept("car"), Concept("truck")], named=named)
    assert "truck" not in both.held["car"]


def test_kinds_of_one_name_are_no_siblings_of_another():
    tokens = {"sword": at(0.52, 1.0), "knife": at(0.45, 2.0), "tree": at(0.0)}
    for synonyms in ((), ("gun",)):
        concept = Concept("weapon", synonyms=synonyms)
        named = {"weapon": at(1.0), "gun": at(0.99, 3.0)}
        found = around(tokens, [concept], named=named)
        assert "sword" in found.near["weapon"] and not found.held["weapon"]
        assert not {"sword", "knife"} & set(found.relatives["weapon"])


def test_another_person_stays_however_the_name_is_written():
    einstein = Concept("Albert Einstein", kind="person")
    rows = {"Albert Einstein": at(1.0), "Isaac Newton": at(0.7, 2.0), "Newton": at(0.7, 1.0)}
    found = around({"newton": at(0.7, 1.0), "tree": at(0.0)}, [einstein], named=rows)
    assert not {"newton", "Newton", "Isaac Newton"} & set(found.near["Albert Einstein"])
    held = [word.lower() for word in found.held["Albert Einstein"]]
    assert "isaac newton" in held and held.count("newton") == 1


def test_who_is_in_doubt_is_held_by_nobody_and_who_is_spared_is():
    named = {"car": at(1.0), "bus": at(0.0, 2.2)}
    tokens = {"engine": at(0.57, 1.0), "tree": at(-0.5)}
    both = around(tokens, [Concept("car"), Concept("bus")], named=named)
    assert both.borderline["car"] == ("engine",) and "engine" not in both.held["bus"]
    near = {"garage": at(0.7, 1.0), "tree": at(0.0)}
    assert around(near, [Concept("car")]).near["car"] == ("garage",)
    spared = around(near, [Concept("car")], spare=("garage",))
    assert spared.near["car"] == () and spared.held["car"] == ("garage",)


def test_a_category_holds_what_the_lexicon_knows_alone():
    tokens = {"garage": at(0.4, 1.0), "tree": at(0.0)}
    assert around(tokens, [Concept("car")]).held["car"] == ("garage",)
    assert around(tokens, [Concept("car", kind="explicit")]).held["car"] == ()


def test_other_kinds_of_several_tokens_are_looked_at():
    named = {"donut": at(1.0), "friedcake": at(0.0), "cruller": at(0.7, 1.0), "beignet": at(0.5)}
    found = around({"tree": at(0.0)}, [Concept("donut")], named=named)
    assert "cruller" in found.near["donut"] and "beignet" in found.held["donut"]


def test_what_is_kept_named_or_part_of_a_name_is_no_neighbor():
    tokens = {"van": at(0.9), "gogh": at(0.9), "art": at(0.9), "dutch": at(0.9), "tree": at(0.9)}
    concepts = [Concept("van gogh", "art", kind="style")]
    found = around(tokens, concepts, keep=["tree"])
    assert found.near["van gogh"] == ("vangogh", "dutch")
    assert "dutch" not in found.beyond["van gogh"]


def test_spared_words_are_no_neighbors_and_their_parts_may_be():
    tokens = {"domestic": at(0.9, 1.0), "kitty": at(0.9, 2.0), "tree": at(0.0)}
    found = around(tokens, [Concept("cat")], spare=["domestic cat", "kitty"])
    assert found.near["cat"] == ("domestic",)


def test_a_word_of_two_concepts_goes_to_the_nearer_one():
    named = {"one": [1.0, 0.0, 0.0], "two": [0.0, 1.0, 0.0]}
    tokens = {"left": [0.9, 0.7, 0.0], "right": [0.7, 0.9, 0.0], "far": [0.0, 0.0, 1.0]}
    found = around(tokens, [Concept("one"), Concept("two")], named=named)
    assert found.near == {"one": ("left",), "two": ("right",)}


def test_words_that_are_too_many_are_neither_erased_nor_kept():
    tokens = {f"word{i}": at(0.99 - 0.01 * i, i) for i in range(10)} | {"far": at(-0.9)}
    found = around(tokens, [Concept("qworth")], MiningConfig(max_words=4))
    assert found.near["qworth"] == ("word0", "word1", "word2", "word3")
    assert found.surplus["qworth"] == tuple(f"word{i}" for i in range(4, 10))
    assert found.beyond["qworth"] == ("far",)
    category = around(tokens, [Concept("qworth", kind="explicit")], MiningConfig(max_words=4))
    assert len(category.near["qworth"]) == 8 and len(category.surplus["qworth"]) == 2


def test_the_user_s_cosine_is_the_line():
    tokens = {"word": at(0.5, 1.0), "other": at(0.3, 2.0)}
    assert around(tokens, [Concept("name")]).near["name"] == ()
    for cosine, near in ((0.4, ("word",)), (0.2, ("word", "other"))):
        found = around(tokens, [Concept("name")], MiningConfig(word_cosine=cosine))
        assert found.near["name"] == near


@pytest.mark.parametrize("kind", ["object", "explicit"])
@pytest.mark.parametrize("asked", [0, 2, 256])
def test_members_of_a_category_are_those_that_the_model_draws_as_it(kind, asked):
    """Far from the name in text, so that nothing else finds them; only the nearest are drawn."""
    tokens = {"member": at(0.5, 1.0), "opposite": at(0.2, 1.0), "other": at(-0.8), "kept": at(0.9)}
    config = MiningConfig(word_cosine=0.99, member_words=asked, member_cosine=0.4)
    shown = []

    def members(concept, words):
        assert concept.target == "name"
        shown.extend(words)
        return torch.tensor([{"member": 0.5, "opposite": 0.39}.get(word, 0.1) for word in words])

    concepts = [Concept("name", anchor="x", kind=kind)]
    found = around(tokens, concepts, config, keep=["kept"], members=members)
    drawn = kind == "explicit" and asked > 0
    assert found.near["name"] == (("member",) if drawn else ())
    if drawn:
        assert found.sources["member"] == "member"
    assert ("member" in shown) == drawn and len(shown) <= asked


def test_words_in_doubt_are_drawn_if_that_is_asked_for():
    tokens = {
        "cars": at(0.8, 1.0),  # certain
        "truck": at(0.4, 1.0),  # a relative
        "driving": at(0.62, 2.0),  # in doubt, and drawn like a truck
        "garage": at(0.58, 1.5),  # in doubt, and drawn like a car
        "tree": at(0.1),
    }
    looks = {"cars": 0.9, "truck": 0.3, "driving": 0.4, "garage": 0.8}
    shown = []

    def drawn(concept, words):
        shown.append(list(words))
        return torch.tensor([looks[word] for word in words])

    asks = MiningConfig(borderline=2)
    found = around(tokens, [Concept("car")], asks, members=drawn)
    assert set(found.near["car"]) == {"cars", "garage"} and found.sources["garage"] == "drawn"
    assert found.borderline["car"] == ("driving",)
    assert [sorted(words) for words in shown] == [["cars", "driving", "garage", "truck"]]
    # Nothing is drawn unless it is asked for, and nothing is learned where all looks alike.
    assert around(tokens, [Concept("car")], members=drawn).near["car"] == ("cars", "driving")
    looks = dict.fromkeys(looks, 0.5)
    assert around(tokens, [Concept("car")], asks, members=drawn).near["car"] == ("cars", "driving")
    # What is not finite says nothing, and what is kept is no example of anything.
    looks |= {"cars": 0.9, "garage": -math.inf}
    assert around(tokens, [Concept("car")], asks, members=drawn).near["car"] == ("cars",)
    assert len(shown) == 3
    assert not around(tokens, [Concept("car")], asks, members=drawn, spare=["cars"]).near["car"][1:]
    assert len(shown) == 3


def test_no_words_have_no_neighbors():
    found = find_neighbors(known_words({"tree": at(0.9)}, {"cat": at(1.0)}), [], MiningConfig())
    assert found.near == found.surplus == found.relatives == found.beyond == {}


def test_an_anchor_is_a_clear_sibling_that_is_no_look_alike():
    tokens = {
        "truck": [0.55, 0.8, 0.0],  # a sibling of a car, but nearly one
        "ambulance": [0.6, 2.0, 0.0],
        "wagon": [0.5, 2.6, 0.0],
        "bus": [0.01, 0.1, 0.0],  # the model hardly knows it
        "tree": [0.0, 0.0, 2.0],
    }
    known = known_words(tokens, {"car": [1.0, 0.0, 0.0]}, unknown=0.6, related=0.4)
    concepts = [Concept("car")]
    chosen = choose_anchors(known, concepts, gone=["car"])
    assert chosen["car"].words == ("wagon",) and "lexicon" in chosen["car"].why
    # Nothing that leaves is an anchor, and the user's own wins.
    assert choose_anchors(known, concepts, gone=["wagon", "car"]).get("car") != chosen["car"]
    assert not choose_anchors(known, [Concept("car", "tree")], gone=["car"])


def test_a_person_becomes_a_merge_of_people_and_a_style_the_plain_medium():
    tokens = {"man": at(0.4), "woman": at(0.3), "person": at(0.2), "painting": at(0.4, 1.0)}
    tokens |= {"photo": at(0.3, 2.0), "drawing": at(0.55, 1.0), "dog": at(0.45)}
    names = {"barack obama": at(1.0), "cubism": at(1.0)}
    known = known_words(tokens, names, unknown=0.6, related=0.4)
    concepts = [Concept("barack obama", kind="person"), Concept("cubism", kind="style")]
    chosen = choose_anchors(known, concepts, gone=[c.target for c in concepts])
    assert chosen["barack obama"].words == ("man", "person")
    # A drawing looks so much like it that it is none without it.
    assert chosen["cubism"].words == ("painting",)
    # Nobody becomes somebody who is erased as well.
    assert choose_anchors(known, concepts, gone=["person"])["barack obama"].words == ("man",)
    gone = ["man", "woman", "painting", "photo", "drawing"]
    assert not choose_anchors(known, concepts, gone=gone)
    assert not choose_anchors(known, [Concept("nudity", kind="explicit")], gone=[])


@pytest.mark.parametrize("kind", ["object", "explicit"])
def test_kinds_of_a_thing_go_with_it(kind: str) -> None:
    tokens = {"bicycle": at(0.45, 1.0), "garage": at(0.45, 2.0), "tree": at(0.0)}
    found = around(tokens, [Concept("vehicle", kind=kind)])
    assert found.near["vehicle"] == ("bicycle",)


def test_phrases_that_hold_a_name_leave_the_room_to_others():
    named = {"cat": at(1.0), "house cat": at(0.9, 1.0)}
    concept, tokens = Concept("cat"), {"kitty": at(0.8, 2.0), "tree": at(0.0)}
    found = around(tokens, [concept], named=named)
    assert found.near["cat"] == ("kitty", "house cat")
    one = around(tokens, [concept], MiningConfig(max_words=1), named=named)
    assert (one.near["cat"], one.surplus["cat"]) == (("kitty",), ("house cat",))
