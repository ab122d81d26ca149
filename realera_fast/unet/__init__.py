"""What knows Stable Diffusion's U-Net: attention, keys and values of the text, LoRA, sampling."""

from realera_fast.unet import attention
from realera_fast.unet.kv_cache import fuse, unfuse
from realera_fast.unet.lora import TARGET_MODULES, LoraParameters
from realera_fast.unet.sampler import Denoiser, SamplingOptions, config_of, ddim_of
from realera_fast.unet.shared_unet import Conditioning, Model, TextPath

__all__ = [
    "Conditioning",
    "Denoiser",
    "LoraParameters",
    "Model",
    "SamplingOptions",
    "TARGET_MODULES",
    "TextPath",
    "attention",
    "config_of",
    "ddim_of",
    "fuse",
    "unfuse",
]
