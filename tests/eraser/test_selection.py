"""Who goes, who follows and who stays."""

from __future__ import annotations

import dataclasses

from tiny_families import sd1
from tiny_models import WORDS

from realera_fast import EraseConfig, embedded, erase
from realera_fast.mining import Line, Neighborhood
from realera_fast.selection import Selection
from realera_fast.text import (
    Concept,
    PairsConfig,
    TextModel,
    Vocabulary,
    VocabularyConfig,
    encode_vocabulary,
)

LINE = Line(0.6, 0.4, "lexicon", {}, {})
NEAR = Neighborhood(
    {"cat": ("kitten",)}, {"cat": ("kitty",)}, {"cat": ("dog",)}, {"cat": ("tree",)}
)


def selected(vocabulary: Vocabulary, mined=NEAR.near) -> Selection:
    retained = {"dog": "object", "ship": "object"}
    concepts = (Concept("cat", "dog"),)
    return Selection(concepts, NEAR, mined, retained, vocabulary, PairsConfig(), LINE)


def parts():
    pipe = sd1()
    text = TextModel(pipe.text_encoder, pipe.tokenizer)
    return text, encode_vocabulary(text, VocabularyConfig(cache=False), words=WORDS)


def test_the_neighborhood_is_not_preserved_whoever_moves_it():
    _, vocabulary = parts()
    for mined in (NEAR.near, {"cat": ()}):
        selection = selected(vocabulary, mined)
        assert selection.leaving == ["cat", "kitten", "kitty"]
        assert selection.staying[:3] == ["dog", "ship", "puppy"]
        assert not {"cat", "kitten", "kitty"} & set(selection.staying)
        assert len(set(selection.staying)) == len(selection.staying) > 2


def test_words_that_follow_are_erased_and_words_near_are_watched():
    text, vocabulary = parts()
    selection = selected(vocabulary, {"cat": ()})
    assert [word.word for word in selection.prompts(text)] == ["cat"]
    assert [word.word for word in selection.watched_prompts(text)] == ["cat", "kitten"]
    assert selection.watched_prompts(text).named == 1
    assert [word.word for word in selected(vocabulary).prompts(text)] == ["cat", "kitten"]


def test_a_neighbor_that_no_template_has_room_for_does_not_go(caplog):
    """Nobody named it, so that nobody is told to write it shorter."""
    pipe = embedded.load_pipeline()
    templates = {"object": ("a " * 74 + "{}",)}
    config = dataclasses.replace(EraseConfig.fast(), pairs=PairsConfig(templates=templates))
    with caplog.at_level("INFO", "realera_fast"):
        found = erase(pipe, ["cat"], config=config, progress=False)
    near = found.report["neighbors"]["cat"]
    assert "kitten" in near and not [word for word in near if " " in word]
    assert "no template has room for" in caplog.text
