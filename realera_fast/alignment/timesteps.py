"""The time steps at which a prompt decides what is drawn (docs/method.md, section 6.2).

A diffusion model is a classifier of pictures (Li et al., arXiv 2303.16203): at some time steps it
predicts the noise in a picture of the concept better with the word than with the anchor, at others
either will do. SDErasure (ICLR 2026) trains where a softmax of the two errors passes a threshold;
here the mean over the time steps stands in for it.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from realera_fast.ops import philox
from realera_fast.runtime import Processes
from realera_fast.text import AlignedPrompts
from realera_fast.unet import Sampler

logger = logging.getLogger(__name__)

_STARTS, _NOISE = 4 << 20, 5 << 20
"""Numbers of the random streams, each of a first picture."""


def discriminative_steps(
    sampler: Sampler,
    words: Sequence[AlignedPrompts],
    places: Sequence[int],
    bar: Any,
    *,
    seed: int,
    processes: Processes,
) -> Tensor:
    """`[s]` whether the original tells pictures of words from their anchors well at a time step.

    Args:
        sampler: of the denoiser, where its layers are installed; its steps are looked at.
        words: one for each picture, which the original draws; each process has as many.
        places: numbers of the pictures among those of all processes.
    """
    shown = torch.stack([word.source[word.plain] for word in words])
    starts = [philox.fold_seed(seed, _STARTS + place) for place in places]
    pictures = sampler.run(shown, starts, "original", bar).latents[-1]
    noise = sampler.noise([philox.fold_seed(seed, _NOISE + place) for place in places])
    shown = shown.to(pictures.device)
    other = torch.stack([word.anchor[word.plain] for word in words]).to(shown)
    gaps = []
    for timestep in sampler.timesteps:
        times = timestep.expand(len(pictures))
        noised, goal = (f(pictures, noise, times) for f in (sampler.noised, sampler.goal))
        errors = [
            (sampler.teacher(noised, times, states) - goal).square().flatten(1).mean(1)
            for states in (other, shown)
        ]
        gaps.append(errors[0] - errors[1])
    # Gathered, not summed: every process sees the same numbers in the same order.
    gap = processes.gather(torch.stack(gaps, dim=1)).mean(0)
    chosen = (gap > 0) & (gap >= gap.mean())
    if not bool(chosen.any()):
        logger.warning(
            "alignment: at no time step does the model tell pictures of the named words from "
            "their anchors, so all are trained; name other anchors, or set "
            'AlignmentConfig.timesteps="all"'
        )
        chosen = torch.ones_like(chosen)
    return chosen
