"""Models of the shapes that people run, with random weights, on which time hardly depends.

The architectures are those of CompVis/stable-diffusion-v1-4, of SDXL
(stabilityai/stable-diffusion-xl-base-1.0) and of black-forest-labs/FLUX.1-dev, with their whole
text encoders and CLIP's tokenizer. Of FLUX's 57 blocks two are there: its closed form edits the two
maps by which text enters, and those alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDIMScheduler, FluxTransformer2DModel, UNet2DConditionModel
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from realera_fast import embedded


@dataclass(frozen=True)
class Parts:
    """What is erased from, and what reads its prompts."""

    denoiser: Any
    text_encoders: tuple[Any, ...]
    tokenizers: tuple[Any, ...]
    scheduler: Any

    @property
    def unet(self) -> Any:
        """As the pipelines name a denoiser of that kind."""
        return self.denoiser

    @property
    def text_encoder(self) -> Any:
        """As `realera_fast.erase` takes it: the encoder, or all of them."""
        return self.text_encoders if len(self.text_encoders) > 1 else self.text_encoders[0]

    @property
    def tokenizer(self) -> Any:
        """Of `text_encoder`."""
        return self.tokenizers if len(self.tokenizers) > 1 else self.tokenizers[0]


XL: Mapping[str, Any] = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "use_linear_projection": True,
}
"""Where SDXL differs from the class's defaults."""


def _clip(kind: Any, width: int, layers: int, heads: int) -> Any:
    return kind(
        CLIPTextConfig(
            vocab_size=49408,
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            projection_dim=width,
        )
    )


def stable_diffusion_1() -> tuple[Any, list[Any]]:
    """Denoiser and text encoder of Stable Diffusion 1.4."""
    unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
    return unet, [_clip(CLIPTextModel, 768, 12, 12)]


def stable_diffusion_xl() -> tuple[Any, list[Any]]:
    """Denoiser and text encoders of SDXL."""
    first = _clip(CLIPTextModel, 768, 12, 12)
    return UNet2DConditionModel(**XL), [first, _clip(CLIPTextModelWithProjection, 1280, 32, 20)]


def flux() -> tuple[Any, list[Any]]:
    """FLUX.1-dev's entrance of text, one block of each kind, CLIP and T5-XXL's encoder."""
    transformer = FluxTransformer2DModel(num_layers=1, num_single_layers=1, guidance_embeds=True)
    config = T5Config(
        vocab_size=32128,
        d_model=4096,
        d_kv=64,
        d_ff=10240,
        num_layers=24,
        num_heads=64,
        feed_forward_proj="gated-gelu",
    )
    return transformer, [_clip(CLIPTextModel, 768, 12, 12), T5EncoderModel(config)]


MODELS: Mapping[str, Callable[[], tuple[Any, list[Any]]]] = {
    "SD 1.4": stable_diffusion_1,
    "SDXL": stable_diffusion_xl,
    "FLUX": flux,
}


def random_parts(model: str, device: torch.device, dtype: torch.dtype) -> Parts:
    """A model of `MODELS` on a device."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            denoiser, encoders = MODELS[model]()
    finally:
        torch.set_default_dtype(before)
    clip = embedded.load_pipeline().tokenizer
    clip.model_max_length = 77
    tokenizers = tuple(_pieces(clip) if e.config.model_type == "t5" else clip for e in encoders)
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    return Parts(denoiser.eval(), tuple(e.eval() for e in encoders), tokenizers, scheduler)


def embedded_parts() -> Parts:
    """The model that ships with the library."""
    pipe = embedded.load_pipeline()
    return Parts(pipe.unet, (pipe.text_encoder,), (pipe.tokenizer,), pipe.scheduler)


def _pieces(clip: Any) -> Any:
    """A tokenizer of T5's kind that has as many pieces, the first whole words of CLIP's."""
    known = clip.get_vocab()
    words = [t.removesuffix("</w>") for t in sorted(known, key=known.get) if t.endswith("</w>")]
    chosen = [word for word in words if word.isalpha()][:31900]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [(f"\u2581{word}", -1.0 - 1e-4 * i) for i, word in enumerate(chosen)]
    pieces += [("\u2581", -15.0), *((chr(code), -19.0) for code in range(33, 127))]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=512)
