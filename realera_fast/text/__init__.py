"""Concepts and lists of them; text encoders, their vocabulary, prompts aligned token by token."""

from typing import TYPE_CHECKING

from realera_fast.runtime import on_demand
from realera_fast.text.concept_file import ConceptFileError, read_concepts
from realera_fast.text.concepts import KINDS, Concept, check_names, parse_concept, parse_concepts

if TYPE_CHECKING:
    from realera_fast.text.concept_prompts import ConceptPrompts, WithFound
    from realera_fast.text.encoders import Output, Text, TextModel
    from realera_fast.text.free_prompts import FreePrompts
    from realera_fast.text.joined import JoinedText, TextInSections, TextWithPooled
    from realera_fast.text.lexicon import Lexicon, run_together
    from realera_fast.text.padding import read_text_rows
    from realera_fast.text.prompts import AlignedPrompts, align
    from realera_fast.text.templates import PairsConfig, before_word, fill
    from realera_fast.text.token_words import TokenWords, read_token_words, whole_words
    from realera_fast.text.vocabulary import (
        Vocabulary,
        VocabularyConfig,
        encode_vocabulary,
        mean_rows,
        preserve_gram,
        preserved_words,
        prompts_at_a_time,
    )
else:
    __getattr__ = on_demand(
        __name__,
        {
            "encoders": ("Output", "Text", "TextModel"),
            "free_prompts": ("FreePrompts",),
            "lexicon": ("Lexicon", "run_together"),
            "joined": ("JoinedText", "TextInSections", "TextWithPooled"),
            "padding": ("read_text_rows",),
            "prompts": ("AlignedPrompts", "align"),
            "concept_prompts": ("ConceptPrompts", "WithFound"),
            "templates": ("PairsConfig", "before_word", "fill"),
            "token_words": ("TokenWords", "read_token_words", "whole_words"),
            "vocabulary": (
                "Vocabulary",
                "VocabularyConfig",
                "encode_vocabulary",
                "mean_rows",
                "preserve_gram",
                "prompts_at_a_time",
                "preserved_words",
            ),
        },
    )

__all__ = [
    "AlignedPrompts",
    "Concept",
    "ConceptFileError",
    "ConceptPrompts",
    "FreePrompts",
    "JoinedText",
    "KINDS",
    "Lexicon",
    "Output",
    "PairsConfig",
    "Text",
    "TextInSections",
    "TextModel",
    "TextWithPooled",
    "TokenWords",
    "Vocabulary",
    "VocabularyConfig",
    "WithFound",
    "align",
    "before_word",
    "check_names",
    "encode_vocabulary",
    "fill",
    "mean_rows",
    "parse_concept",
    "parse_concepts",
    "preserve_gram",
    "preserved_words",
    "prompts_at_a_time",
    "read_concepts",
    "read_text_rows",
    "read_token_words",
    "run_together",
    "whole_words",
]
