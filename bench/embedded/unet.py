"""The denoiser: a `UNet2DConditionModel` that predicts the velocity (v) of latents."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from embedded.common import autocast
from embedded.denoiser import Denoiser, train
from embedded.examples import Examples
from embedded.pipeline import build_scheduler, build_unet, export_pipeline

MIN_SNR = 5.0
PHASES = dict(
    # What things look like.
    things=dict(
        steps=12_000,
        lr=8e-4,
        warmup=500,
        captions="said",
        scene_share=0.25,
        styled_share=0.3,
        blend_from=0.7,
        blend_share=0.3,
        blend_most=0.6,
        blend_scenes=True,
    ),
    # What stands beside what.
    scenes=dict(
        steps=6_000,
        lr=5e-4,
        warmup=200,
        captions="said",
        scene_share=0.45,
        styled_share=0.4,
        blend_from=0.0,
        blend_share=0.7,
        blend_most=0.7,
        blend_scenes=False,
    ),
    # What further words mean, so that those mean something that nobody said.
    heard=dict(
        steps=10_000,
        lr=5e-4,
        warmup=200,
        captions="heard",
        scene_share=0.5,
        styled_share=0.3,
        blend_from=0.0,
        blend_share=0.5,
        blend_most=0.6,
        blend_scenes=False,
    ),
    # Two things again, by all words.
    beside=dict(
        steps=4_000,
        lr=4e-4,
        warmup=200,
        captions="heard",
        scene_share=0.65,
        styled_share=0.4,
        blend_from=0.0,
        blend_share=0.5,
        blend_most=0.6,
        blend_scenes=False,
    ),
)


def ready(unet: Any) -> None:
    from diffusers.models.attention_processor import AttnProcessor

    unet.set_attn_processor(AttnProcessor())  # on a CPU twice as fast backwards as the fused one
    unet.compile()


@lru_cache
def noise_levels() -> tuple[Tensor, Tensor]:
    """Share of the picture that is left at every step, and min-SNR weights for v."""
    alphas = build_scheduler().alphas_cumprod
    snr = alphas / (1 - alphas)
    return alphas, (1 + snr).clamp(max=1 + MIN_SNR) / (1 + snr)


def loss(denoise: Callable[..., Any], batch: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Error of the velocity (v), min-SNR weighted, and as it is.

    Which thing it is, only the text says where noise hides the picture. There a noise prediction
    says next to nothing of the picture, while v is the picture itself.
    """
    x, states = batch
    alphas, weights = noise_levels()
    noise, t = torch.randn_like(x), torch.randint(0, 1000, (len(x),))
    a = alphas[t].view(-1, 1, 1, 1)
    with autocast():
        guess = denoise(
            a.sqrt() * x + (1 - a).sqrt() * noise, t, encoder_hidden_states=states
        ).sample
    velocity = a.sqrt() * noise - (1 - a).sqrt() * x
    error = (guess.float() - velocity).square().mean((1, 2, 3))
    return (weights[t] * error).mean(), error.mean()


UNET = Denoiser(
    name="unet",
    phases=PHASES,
    seed=4,
    build=build_unet,
    ready=ready,
    examples=Examples,
    loss=loss,
    export=export_pipeline,
)


def stage_unet(work: Path) -> None:
    train(work, UNET)
