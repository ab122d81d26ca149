"""A short training of the LoRA stage on tiny models."""

from __future__ import annotations

import dataclasses

from realera_fast.alignment import AlignmentConfig, align_noise
from realera_fast.mining import MiningConfig
from realera_fast.solver import ConceptMap
from realera_fast.text import align

CONFIG = AlignmentConfig(
    steps=12, batch_size=4, trajectories=4, sampling_steps=4, check_seeds=2, learning_rate=2e-2
)
UNCHECKED = dataclasses.replace(CONFIG, check_seeds=0)


class Words(list):
    """Aligned prompts, the first of them named."""

    named = 1


def run(parts, config=CONFIG, seed=0, mode="vocabulary", words=("cat",), **options):
    pipe, text = parts
    templates = ["a photo of a {}", "{}", "a {}", "the {}"]
    return align_noise(
        pipe.unet,
        pipe.scheduler,
        ConceptMap.identity(text.width),
        prompts=Words(align(text, word, "dog", templates) for word in words),
        preserve=text.encode(["a ship", "a tree", "a horse"]),
        empty=text.encode([""]),
        config=config,
        mining_config=MiningConfig(mode=mode),
        seed=seed,
        progress=False,
        **options,
    )
