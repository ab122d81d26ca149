"""Concepts and lists of them; text encoders, their vocabulary, prompts aligned token by token."""

from typing import TYPE_CHECKING

from realera_fast.runtime import on_demand
from realera_fast.text.concept_file import ConceptFileError, read_concepts
from realera_fast.text.concepts import KINDS, Concept, check_names, parse_concept, parse_concepts

if TYPE_CHECKING:
    from realera_fast.text.encoders import Output, Text, TextModel
    from realera_fast.text.joined import JoinedText, TextWithPooled
    from realera_fast.text.prompts import AlignedPrompts, ConceptPrompts, PairsConfig, align, fill
    from realera_fast.text.vocabulary import (
        Vocabulary,
        VocabularyConfig,
        describe,
        encode_vocabulary,
        mean_rows,
        preserve_gram,
    )
else:
    __getattr__ = on_demand(
        __name__,
        {
            "encoders": ("Output", "Text", "TextModel"),
            "joined": ("JoinedText", "TextWithPooled"),
            "prompts": ("AlignedPrompts", "ConceptPrompts", "PairsConfig", "align", "fill"),
            "vocabulary": (
                "Vocabulary",
                "VocabularyConfig",
                "describe",
                "encode_vocabulary",
                "mean_rows",
                "preserve_gram",
            ),
        },
    )

__all__ = [
    "AlignedPrompts",
    "Concept",
    "ConceptFileError",
    "ConceptPrompts",
    "JoinedText",
    "KINDS",
    "Output",
    "PairsConfig",
    "Text",
    "TextModel",
    "TextWithPooled",
    "Vocabulary",
    "VocabularyConfig",
    "align",
    "check_names",
    "describe",
    "encode_vocabulary",
    "fill",
    "mean_rows",
    "parse_concept",
    "parse_concepts",
    "preserve_gram",
    "read_concepts",
]
