"""Neighbors of a concept: regions and samples, words of the vocabulary, members of a category."""

from realera_fast.mining.category_members import STEPS, MemberSearch, can_be_drawn, guidance_cosine
from realera_fast.mining.config import MiningConfig
from realera_fast.mining.region import Moments, Region, Samples, moments, sample
from realera_fast.mining.rows import add_neighbors
from realera_fast.mining.vocabulary_neighbors import Neighborhood, neighbor_words

__all__ = [
    "MemberSearch",
    "MiningConfig",
    "Moments",
    "Neighborhood",
    "Region",
    "STEPS",
    "Samples",
    "add_neighbors",
    "can_be_drawn",
    "guidance_cosine",
    "moments",
    "neighbor_words",
    "sample",
]
