"""The plain diffusion loss on given pictures: what every attack with gradients follows.

    | eps'(z_t, t, text) - eps |^2        t uniform, eps standard normal

with the velocity in place of eps where the denoiser predicts that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Noised:
    """A batch of noised pictures."""

    chosen: Tensor
    """`[b]`: which pictures."""
    z: Tensor
    """`[b, c, h, w]`."""
    t: Tensor
    """`[b]`."""
    aim: Tensor
    """`[b, c, h, w]`: what the denoiser should say."""


class Denoising:
    """Draws noised pictures, and says how well the denoiser of now explains them."""

    def __init__(
        self, pipe: Any, latents: Tensor, batch_size: int, generator: torch.Generator
    ) -> None:
        """
        Args:
            latents: `[n, c, h, w]` of pictures, scaled as the denoiser takes them.
        """
        self._pipe, self._latents = pipe, latents
        self._count, self._generator = batch_size, generator
        self._velocity = pipe.scheduler.config.prediction_type == "v_prediction"

    def draw(self) -> Noised:
        scheduler, generator, device = self._pipe.scheduler, self._generator, self._latents.device
        times = len(scheduler.alphas_cumprod)
        chosen = torch.randint(len(self._latents), (self._count,), generator=generator)
        t = torch.randint(times, (self._count,), generator=generator).to(device)
        clean = self._latents[chosen].float()
        eps = torch.randn(clean.shape, generator=generator).to(device)
        z = scheduler.add_noise(clean, eps, t)
        return Noised(
            chosen, z, t, scheduler.get_velocity(clean, eps, t) if self._velocity else eps
        )

    def loss(self, noised: Noised, states: Tensor) -> Tensor:
        """Of the denoiser of now with these embeddings `[b or 1, tokens, d]` of the text."""
        unet = self._pipe.unet
        states = states.expand(self._count, -1, -1).to(unet.dtype)
        out = unet(noised.z.to(unet.dtype), noised.t, encoder_hidden_states=states).sample
        return functional.mse_loss(out.float(), noised.aim)


def tokens_of(pipe: Any, prompts: Sequence[str]) -> Tensor:
    """`[prompts, tokens]`, padded as the pipeline pads them."""
    found: Tensor = pipe.tokenizer(
        list(prompts),
        padding="max_length",
        max_length=pipe.tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    ).input_ids
    return found.to(pipe.text_encoder.device)


def embeds_of(pipe: Any, prompts: Sequence[str]) -> Tensor:
    """`[prompts, tokens, d]`, as the pipeline draws from them: a method of run time moves them."""
    found: Tensor = pipe.encode_prompt(list(prompts), pipe.unet.device, 1, False)[0]
    return found


@torch.no_grad()
def encode_pictures(pipe: Any, pictures: Sequence[Any]) -> Tensor:
    """`[n, c, h, w]` latents of pictures, scaled as the denoiser takes them."""
    images = pipe.image_processor.preprocess(list(pictures)).to(pipe.vae.device, pipe.vae.dtype)
    latents: Tensor = pipe.vae.encode(images).latent_dist.mean
    shift = getattr(pipe.vae.config, "shift_factor", None) or 0.0
    return (latents - shift) * pipe.vae.config.scaling_factor


@torch.no_grad()
def decode_pictures(pipe: Any, latents: Tensor) -> list[Any]:
    """The pictures of latents."""
    shift = getattr(pipe.vae.config, "shift_factor", None) or 0.0
    scaled = latents.to(pipe.vae.dtype) / pipe.vae.config.scaling_factor + shift
    images = pipe.vae.decode(scaled).sample
    found: list[Any] = pipe.image_processor.postprocess(images.float(), output_type="pil")
    return found
