"""How a denoiser is run as its variants, and what knows Stable Diffusion's U-Net.

Variants, LoRA and sampling are the same for every denoiser; attention, keys and values of the text
and DDIM are the U-Net's.
"""

from realera_fast.unet import attention
from realera_fast.unet.denoiser import FP16_SCALE, SharedDenoiser, Variant, is_own_call
from realera_fast.unet.kv_cache import fuse, unfuse
from realera_fast.unet.lora import SELF_ATTENTION, TARGET_MODULES, LoraParameters
from realera_fast.unet.sampler import (
    DDIMSampler,
    Moved,
    Sampler,
    SamplingOptions,
    config_of,
    ddim_of,
)
from realera_fast.unet.shared_unet import Conditioning, SharedUNet

__all__ = [
    "Conditioning",
    "DDIMSampler",
    "FP16_SCALE",
    "LoraParameters",
    "Moved",
    "SELF_ATTENTION",
    "Sampler",
    "SamplingOptions",
    "SharedDenoiser",
    "SharedUNet",
    "TARGET_MODULES",
    "Variant",
    "attention",
    "config_of",
    "ddim_of",
    "fuse",
    "is_own_call",
    "unfuse",
]
