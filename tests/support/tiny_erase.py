"""Erasing from the tiny U-Net with few settings: alignment kept short, or left out."""

from __future__ import annotations

import dataclasses

import realera_fast
from realera_fast import EraseConfig
from realera_fast.alignment import AlignmentConfig
from realera_fast.mining import MiningConfig
from realera_fast.text import PairsConfig, VocabularyConfig

FAST = AlignmentConfig(steps=2, batch_size=2, trajectories=2, sampling_steps=2, check_seeds=0)
CONFIG = EraseConfig(
    pairs=PairsConfig(negative_guidance=0.75, anchors="mean"),
    # Random encoders say nothing about words.
    mining=MiningConfig(word_cosine=0.6),
    alignment=FAST,
    vocabulary=VocabularyConfig(cache=False, preserve_scale=5.0),
)
CLOSED = dataclasses.replace(CONFIG, alignment=dataclasses.replace(FAST, enabled=False))

ATTACKED = dataclasses.replace(
    CONFIG,
    mining=dataclasses.replace(CONFIG.mining, attack_rounds=2, attack_prompts=3, attack_steps=4),
    alignment=dataclasses.replace(FAST, adversary="worst", batch_size=4),
)


def run(pipe, concepts, config=CLOSED, **options):
    return realera_fast.erase(
        pipe.unet,
        pipe.text_encoder,
        concepts,
        **{"tokenizer": pipe.tokenizer, "scheduler": pipe.scheduler, "config": config}
        | {"progress": False}
        | options,
    )
