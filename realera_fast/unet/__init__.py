"""What knows Stable Diffusion's U-Net: attention, keys and values of the text, LoRA, sampling."""

from realera_fast.unet import attention
from realera_fast.unet.kv_cache import fuse, unfuse
from realera_fast.unet.lora import TARGET_MODULES, LoraParameters
from realera_fast.unet.sampler import DDIMSampler, Moved, SamplingOptions, config_of, ddim_of
from realera_fast.unet.shared_unet import Conditioning, SharedUNet, Variant

__all__ = [
    "Conditioning",
    "DDIMSampler",
    "LoraParameters",
    "Moved",
    "SamplingOptions",
    "SharedUNet",
    "TARGET_MODULES",
    "Variant",
    "attention",
    "config_of",
    "ddim_of",
    "fuse",
    "unfuse",
]
