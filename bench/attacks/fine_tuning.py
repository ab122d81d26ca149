"""A few steps of ordinary training on pictures of other things.

Who uses an erased model may fine-tune it for something else, and erased concepts were seen to come
back (Suriyakumar et al., "Unstable unlearning", arXiv 2410.08074). The edited denoiser follows the
plain diffusion loss on pictures with captions, none of which is about the concept; then the
concept's name is asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from attacks.denoising import Denoising, embeds_of


@dataclass(frozen=True)
class Settings:
    """Ours, tried on cow and house."""

    layers: str = "attn2"
    """Part of the names of the weights that are trained: cross-attention, where erasers edit. An
    empty string trains the whole denoiser."""
    steps: int = 40
    batch_size: int = 8
    learning_rate: float = 1e-3
    """AdamW's, constant."""


@contextmanager
def fine_tuned(
    pipe: Any,
    latents: Tensor,
    captions: Sequence[str],
    seed: int,
    settings: Settings | None = None,
) -> Iterator[None]:
    """The pipeline with its denoiser trained; afterwards its weights are what they were, bit for
    bit.

    Args:
        latents: `[n, c, h, w]` of pictures, scaled as the denoiser takes them.
        captions: one a picture.
    """
    options, unet = settings or Settings(), pipe.unet
    trained = [p for name, p in unet.named_parameters() if options.layers in name]
    asked = [p.requires_grad for p in trained]
    before = [p.detach().clone() for p in trained]
    try:
        for p in trained:
            p.requires_grad_(True)
        _train(pipe, trained, latents, captions, seed, options)
        yield
    finally:
        with torch.no_grad():
            for p, value, flag in zip(trained, before, asked, strict=True):
                p.copy_(value)
                p.requires_grad_(flag)


def _train(
    pipe: Any,
    trained: Sequence[Tensor],
    latents: Tensor,
    captions: Sequence[str],
    seed: int,
    options: Settings,
) -> None:
    with torch.no_grad():
        states = embeds_of(pipe, captions)
    denoising = Denoising(pipe, latents, options.batch_size, torch.Generator().manual_seed(seed))
    # A step is below the precision of half a weight: sums go on in float32.
    exact = [p.detach().float().clone() for p in trained]
    optimizer = torch.optim.AdamW(exact, lr=options.learning_rate)
    for _ in range(options.steps):
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            noised = denoising.draw()
            grads = torch.autograd.grad(denoising.loss(noised, states[noised.chosen]), trained)
        for value, grad in zip(exact, grads, strict=True):
            value.grad = grad.float()
        optimizer.step()
        with torch.no_grad():
            for p, value in zip(trained, exact, strict=True):
                p.copy_(value)
