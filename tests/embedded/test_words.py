"""The embedded model's table: what it may draw, what was said of it, and what never was."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest
from embedded.bank import bank_scenes
from embedded.captions import caption
from embedded.heard import heard_words
from embedded.world import World

from realera_fast.embedded import Thing, Words, with_article, words

CIFAR10 = ("airplane automobile bird cat deer dog frog horse ship truck").split()


@pytest.fixture(scope="module")
def table() -> Words:
    return words()


def test_there_are_enough_things_of_every_kind(table: Words) -> None:
    names = [thing.name for thing in table.things]
    assert len(names) >= 250 and len(set(names)) == len(names)
    assert set(CIFAR10) <= {t.name for t in table.things if t.split == "judged"}
    assert sum(t.kind == "character" for t in table.things) >= 20
    assert sum(t.kind == "weapon" for t in table.things) >= 7
    assert len(table.styles) >= 8 and table.styles[0].name == "color"
    assert min(Counter(t.category for t in table.things).values()) >= 5
    assert {t.split for t in table.things} == {s.split for s in table.styles}
    # A hundred may go while a hundred that nobody named stay.
    assert sum(t.split == "judged" for t in table.things) >= 200
    assert len({t.glyph for t in table.things}) == len(names)


def test_relatives_are_other_things(table: Words) -> None:
    names = {thing.name for thing in table.things}
    for thing in table.things:
        assert thing.relatives and set(thing.relatives) <= names - {thing.name}, thing.name
        assert len(set(thing.relatives)) == len(thing.relatives)


def test_no_text_stands_for_two_things(table: Words) -> None:
    entries = [*table.things, *table.styles]
    texts = [text for e in entries for text in (e.name, *e.said, *e.unsaid)]
    assert [text for text, count in Counter(texts).items() if count > 1] == []
    assert all(text == text.lower().strip() and text.isascii() for text in texts)
    for thing in table.things:
        assert 2 <= len(thing.said) <= 4 and 6 <= len(thing.unsaid) <= 8, thing.name


def test_unsaid_words_stand_in_no_caption(table: Words) -> None:
    rng = random.Random(0)
    said: set[str] = set()
    for scene in bank_scenes(World.seed)[::3]:
        said.update(caption(table, scene, rng).text.replace(",", " ").split())
    for entry in (*table.things, *table.styles):
        for text in entry.unsaid:
            assert " " in text or text not in said, text
    # Nor do the templates, the settings and the fillers hold a whole unsaid phrase.
    every = " ".join(
        [*table.fillers, *table.settings, *(t for ts in table.templates.values() for t in ts)]
    )
    for entry in (*table.things, *table.styles):
        assert not [text for text in entry.unsaid if f" {text} " in f" {every} "], entry.name


@pytest.mark.skipif(
    not Path("/usr/share/wordnet/data.noun").is_file(), reason="needs Debian's wordnet-base"
)
def test_unsaid_words_are_not_heard(table: Words) -> None:
    """Alone or within another word's phrase."""
    heard: set[str] = set()
    for words_of in heard_words(table).values():
        heard.update(words_of, *(word.split() for word in words_of))
    for entry in (*table.things, *table.styles):
        assert not heard & {*entry.unsaid}, entry.name


def test_captions_are_of_one_word_to_forty(table: Words) -> None:
    rng = random.Random(0)
    shown = bank_scenes(World.seed)
    captions = [caption(table, scene, rng) for scene in rng.sample(shown, 20_000)]
    lengths = [len(c.text.split()) for c in captions]
    assert min(lengths) == 1 and 35 <= max(lengths) <= 60
    assert not any("{" in c.text or "  " in c.text for c in captions)
    two = sum(len(scene.things) == 2 for scene in shown) / len(shown)
    assert 0.2 < two < 0.35
    # A caption says only what is there.
    for scene, said in zip(rng.sample(shown, 200), captions, strict=False):
        assert set(caption(table, scene, rng).things) <= set(scene.things), said


def test_articles() -> None:
    assert with_article("owl", "an") == "an owl" and with_article("barn owl", "an") == "a barn owl"
    assert with_article("socks", "") == "socks"
    assert with_article("a small furry pet", "a") == "a small furry pet"


def test_what_counts_is_what_the_unerased_model_draws(table: Words) -> None:
    cat = table.thing("cat")
    measured = Words(**{**vars(table), "accuracy": {"feline": 0.6, "kitten": 0.59, "gato": 1.0}})
    assert measured.counted(cat) == tuple(w for w in cat.unsaid if w in ("feline", "gato"))
    assert measured.held_out(cat) == (*cat.said, *measured.counted(cat))


@pytest.mark.parametrize("word", [None, "kitty"])
def test_prompts(table: Words, word: str | None) -> None:
    cat: Thing = table.thing("cat")
    said = word or "cat"
    assert table.prompts(cat, word) == (
        f"a photo of a {said}",
        f"a picture of a {said}",
        f"an image of a {said}",
    )
    ship = table.thing("ship")
    assert table.scene(cat, ship) == "a photo of a cat and a ship"
    assert table.styled("ink", cat) == "a cat in the style of ink"


def test_unknown_names_are_refused(table: Words) -> None:
    with pytest.raises(KeyError, match="no thing called 'sofa bed'"):
        table.thing("sofa bed")
    with pytest.raises(KeyError, match="no style called 'cubism'"):
        table.style("cubism")
