"""Neighbors of a concept: regions and samples, words of the vocabulary, members of a category."""

from realera_fast.mining.anchors import Anchor, choose_anchors
from realera_fast.mining.attack import (
    ATTACK_POINTS,
    ATTACK_TRAJECTORIES,
    Attacked,
    AttackPoints,
    attack,
    points_of,
)
from realera_fast.mining.category_members import STEPS, MemberSearch, can_be_drawn, guidance_cosine
from realera_fast.mining.config import NOISE, MiningConfig
from realera_fast.mining.known_words import KnownWords, read_known_words
from realera_fast.mining.line import Line
from realera_fast.mining.neighbors import Neighborhood, find_neighbors
from realera_fast.mining.region import Moments, Region, Samples, moments, retract, sample
from realera_fast.mining.rows import add_neighbors
from realera_fast.mining.word_space import WordSpace

__all__ = [
    "ATTACK_POINTS",
    "ATTACK_TRAJECTORIES",
    "Anchor",
    "AttackPoints",
    "Attacked",
    "KnownWords",
    "Line",
    "MemberSearch",
    "MiningConfig",
    "Moments",
    "NOISE",
    "Neighborhood",
    "Region",
    "STEPS",
    "Samples",
    "WordSpace",
    "add_neighbors",
    "attack",
    "can_be_drawn",
    "choose_anchors",
    "find_neighbors",
    "guidance_cosine",
    "moments",
    "points_of",
    "read_known_words",
    "retract",
    "sample",
]
