"""Who goes, who follows and who stays."""

from __future__ import annotations

from tiny_families import sd1

from realera_fast.mining import Neighborhood
from realera_fast.selection import Selection
from realera_fast.text import (
    Concept,
    PairsConfig,
    TextModel,
    Vocabulary,
    VocabularyConfig,
    encode_vocabulary,
)

NEAR = Neighborhood({"cat": ("kitten",)}, {"cat": ("kitty",)}, {"cat": ("tree",)})


def selected(vocabulary: Vocabulary, mined=NEAR.near) -> Selection:
    retained = {"dog": "object", "ship": "object"}
    concepts = (Concept("cat", "dog"),)
    return Selection(concepts, NEAR, mined, retained, vocabulary, PairsConfig())


def parts():
    pipe = sd1()
    text = TextModel(pipe.text_encoder, pipe.tokenizer)
    return text, encode_vocabulary(text, VocabularyConfig(cache=False))


def test_the_neighborhood_is_not_preserved_whoever_moves_it():
    _, vocabulary = parts()
    for mined in (NEAR.near, {"cat": ()}):
        selection = selected(vocabulary, mined)
        assert selection.leaving == ["cat", "kitten", "kitty"]
        assert selection.staying[:2] == ["dog", "ship"]
        assert not {"cat", "kitten", "kitty"} & set(selection.staying)
        assert len(set(selection.staying)) == len(selection.staying) > 2


def test_words_that_follow_are_erased_and_words_near_are_watched():
    text, vocabulary = parts()
    selection = selected(vocabulary, {"cat": ()})
    assert [word.word for word in selection.prompts(text)] == ["cat"]
    assert [word.word for word in selection.watched_prompts(text)] == ["cat", "kitten"]
    assert selection.watched_prompts(text).named == 1
    assert [word.word for word in selected(vocabulary).prompts(text)] == ["cat", "kitten"]
