"""A picture of the concept as the start: noised, then denoised by the erased model (SDEdit, Meng et
al., arXiv 2108.01073, as in stock image-to-image pipelines).

At low strength the picture itself survives, whatever the model knows: what counts is the distance
to the original model asked for something else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image


def redraw(
    pipe: Any,
    pictures: Sequence[Image.Image],
    prompts: Sequence[str],
    strength: float,
    *,
    steps: int,
    guidance: float,
    seed: int,
) -> list[Image.Image]:
    """The pictures, redrawn.

    Args:
        prompts: one a picture.
        strength: part of the noise schedule that is run, in (0, 1].
        steps: of the whole schedule.
    """
    from diffusers import StableDiffusionImg2ImgPipeline

    redrawing = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    redrawing.set_progress_bar_config(disable=True)
    # A method of run time is on the pipeline, not in its modules.
    redrawing.encode_prompt = pipe.encode_prompt
    generators = [torch.Generator().manual_seed(seed + i) for i in range(len(pictures))]
    found: list[Image.Image] = redrawing(
        list(prompts),
        image=list(pictures),
        strength=strength,
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=generators,
    ).images
    return found
