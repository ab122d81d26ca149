"""The stock pipelines around the denoisers, and how they are written."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from embedded.drawing import SIZE
from embedded.text_encoder import trained_text
from embedded.vae import VAE, trained_vae
from embedded.world import World, world_of
from realera_fast.embedded.flow import shared_parts

UNET = dict(channels=(128, 208), layers=1, heads=4)
PATCH = 2
TRANSFORMER = dict(layers=6, heads=4, head_width=64)


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


def build_transformer(world: World):
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(world.seed)
    cells, width = SIZE // 8, TRANSFORMER["heads"] * TRANSFORMER["head_width"]
    return SD3Transformer2DModel(
        sample_size=cells,
        patch_size=PATCH,
        in_channels=VAE["latent"],
        out_channels=VAE["latent"],
        num_layers=TRANSFORMER["layers"],
        num_attention_heads=TRANSFORMER["heads"],
        attention_head_dim=TRANSFORMER["head_width"],
        joint_attention_dim=2 * world.text_width,
        pooled_projection_dim=2 * world.text_width,
        caption_projection_dim=width,
        pos_embed_max_size=cells // PATCH,
        qk_norm="rms_norm",
    )


def flow_pipeline(work: Path, transformer):
    """The stock pipeline around a transformer."""
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    parts = shared_parts(*trained_text(work), trained_vae(work))
    # Latents of 64 cells need no shift of the times.
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    pipe = StableDiffusion3Pipeline(transformer=transformer, scheduler=scheduler, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def replace_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """The folder that ``write`` fills appears whole or not at all."""
    part, old = folder.with_name(folder.name + ".part"), folder.with_name(folder.name + ".old")
    for stale in (part, old):
        shutil.rmtree(stale, ignore_errors=True)
    write(part)
    if folder.exists():
        folder.rename(old)
    part.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def export_pipeline(work: Path, averaged: dict[str, Tensor], folder: Path) -> None:
    """Write the pipeline in float16 storage."""
    unet = build_unet(world_of(work))
    unet.load_state_dict(averaged)
    pipe = pipeline(work, unet)
    for module in (pipe.unet, pipe.vae, pipe.text_encoder):
        module.half()
    replace_folder(folder, lambda part: pipe.save_pretrained(part, safe_serialization=True))


def export_flow(work: Path, averaged: dict[str, Tensor], folder: Path) -> None:
    """Write what the sibling shares with nobody, in float16 storage: transformer and scheduler."""
    transformer = build_transformer(world_of(work))
    transformer.load_state_dict(averaged)
    pipe = flow_pipeline(work, transformer)

    def write(part: Path) -> None:
        pipe.save_config(part)
        pipe.scheduler.save_pretrained(part / "scheduler")
        pipe.transformer.half().save_pretrained(part / "transformer", safe_serialization=True)

    replace_folder(folder, write)


def save_shared(work: Path, folder: Path) -> None:
    """Write what the sibling takes from the embedded model, where there is no such model."""
    tokenizer, encoder = trained_text(work)
    vae = trained_vae(work)

    def write(part: Path) -> None:
        tokenizer.save_pretrained(part / "tokenizer")
        encoder.half().save_pretrained(part / "text_encoder", safe_serialization=True)
        vae.half().save_pretrained(part / "vae", safe_serialization=True)

    replace_folder(folder, write)
