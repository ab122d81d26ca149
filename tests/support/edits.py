"""A closed-form edit of any tiny pipeline, the same for every test that needs an edited one."""

from __future__ import annotations

from realera_fast import EraseConfig, erase
from realera_fast.alignment import AlignmentConfig
from realera_fast.solver import ClosedFormConfig
from realera_fast.text import PairsConfig, VocabularyConfig

CLOSED = EraseConfig(
    alignment=AlignmentConfig(enabled=False),
    # Few features: a prior of the default's weight leaves a word no way to go.
    vocabulary=VocabularyConfig(words=6, preserve_scale=5.0, cache=False),
    pairs=PairsConfig(context_words=2, neutral_words=4),
    # A fixed, moderate edit: random encoders say nothing about words.
    closed_form=ClosedFormConfig(ridge=1.0),
)


def edited(pipe, **options):
    """The erasure of a cat, applied to the pipeline."""
    return erase(pipe, ["cat=dog"], config=options.pop("config", CLOSED), progress=False, **options)
