"""The stock pipeline around the denoiser, and how it is written."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from torch import Tensor

from embedded.drawing import SIZE
from embedded.text_encoder import trained_text
from embedded.vae import VAE, trained_vae
from embedded.world import World, world_of

UNET = dict(channels=(128, 208), layers=1, heads=4)


def build_unet(world: World):
    from diffusers import UNet2DConditionModel

    torch.manual_seed(world.seed)
    levels = len(UNET["channels"])
    return UNet2DConditionModel(
        sample_size=SIZE // 8,
        in_channels=VAE["latent"],
        out_channels=VAE["latent"],
        block_out_channels=UNET["channels"],
        layers_per_block=UNET["layers"],
        down_block_types=("CrossAttnDownBlock2D",) * levels,
        up_block_types=("CrossAttnUpBlock2D",) * levels,
        cross_attention_dim=world.text_width,
        attention_head_dim=UNET["heads"],
        norm_num_groups=16,
    )


def build_scheduler():
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction",
    )


def pipeline(work: Path, unet):
    """The stock pipeline around a denoiser."""
    from diffusers import StableDiffusionPipeline

    tokenizer, encoder = trained_text(work)
    pipe = StableDiffusionPipeline(
        vae=trained_vae(work),
        text_encoder=encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        image_encoder=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def export_pipeline(work: Path, averaged: dict[str, Tensor], folder: Path) -> None:
    """Write the pipeline in float16 storage; the folder appears whole or not at all."""
    unet = build_unet(world_of(work))
    unet.load_state_dict(averaged)
    pipe = pipeline(work, unet)
    for module in (pipe.unet, pipe.vae, pipe.text_encoder):
        module.half()
    part, old = folder.with_name(folder.name + ".part"), folder.with_name(folder.name + ".old")
    for stale in (part, old):
        shutil.rmtree(stale, ignore_errors=True)
    pipe.save_pretrained(part, safe_serialization=True)
    if folder.exists():
        folder.rename(old)
    part.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
