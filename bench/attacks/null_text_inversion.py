"""A picture of the concept is inverted and drawn again, without any text (after TINA, arXiv
2603.17828; the embeddings per time step are those of null-text inversion, arXiv 2211.09794).

DDIM run backwards with the empty prompt takes the picture's latents z_0 to noise z_T. Going forward
from there, the empty prompt's embedding of each time step follows

    min | step(w_t, t, embedding_t) - z_{t-1} |^2

where w_t is where the earlier steps led. An edit that reads the concept's text is never asked.
Whatever a denoiser can be steered to comes back so, also what it never knew: a denoiser of random
weights is the control, and without a gap to that nothing follows about what a model remembers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from attacks.denoising import decode_pictures, tokens_of


@dataclass(frozen=True)
class Settings:
    """The paper takes 50 time steps of 25 AdamW steps each; a model that draws in six steps needs
    fewer (ours, chosen on cow)."""

    steps: int = 10
    """DDIM's, there and back."""
    inner_steps: int = 2
    """AdamW's, of each time step."""
    learning_rate: float = 0.03
    """AdamW's step, in units of the root mean square of the empty prompt's embedding."""


def redraw(pipe: Any, latents: Tensor, settings: Settings | None = None) -> list[Image.Image]:
    """The pictures, drawn by the model as it is now from noise and empty prompts of their own.

    Args:
        latents: `[n, c, h, w]` of pictures of the concept, scaled as the denoiser takes them.
    """
    from diffusers import DDIMScheduler

    options, unet = settings or Settings(), pipe.unet
    with torch.no_grad():
        empty = pipe.text_encoder(tokens_of(pipe, [""]))[0].float()
    scale = float(empty.square().mean().sqrt())
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    scheduler.set_timesteps(options.steps, device=latents.device)
    trajectory = invert(pipe, latents, empty, options.steps)
    w = trajectory[-1]
    states = empty.expand(len(latents), -1, -1).clone()

    def step(w: Tensor, t: Tensor, states: Tensor) -> Tensor:
        out = unet(w.to(unet.dtype), t, encoder_hidden_states=states.to(unet.dtype)).sample
        found: Tensor = scheduler.step(out.float(), t, w).prev_sample
        return found

    for t, wanted in zip(scheduler.timesteps, reversed(trajectory[:-1]), strict=True):
        # Goes on from the step before, as null-text inversion does.
        states = states.detach().requires_grad_(True)
        optimizer = torch.optim.AdamW([states], lr=options.learning_rate * scale, weight_decay=0.0)
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            for _ in range(options.inner_steps):
                loss = (step(w, t, states) - wanted).square().sum()
                (states.grad,) = torch.autograd.grad(loss, [states])
                optimizer.step()
        with torch.no_grad():
            w = step(w, t, states)
    return decode_pictures(pipe, w)


@torch.no_grad()
def invert(pipe: Any, latents: Tensor, states: Tensor, steps: int) -> list[Tensor]:
    """z_0 to z_T: DDIM backwards with one embedding `[1, tokens, d]` for all pictures."""
    from diffusers import DDIMInverseScheduler

    scheduler = DDIMInverseScheduler.from_config(pipe.scheduler.config)
    scheduler.set_timesteps(steps, device=latents.device)
    unet, z = pipe.unet, latents.float()
    states = states.expand(len(z), -1, -1).to(unet.dtype)
    trajectory = [z]
    for t in scheduler.timesteps:
        out = unet(z.to(unet.dtype), t, encoder_hidden_states=states).sample
        z = scheduler.step(out.float(), t, z).prev_sample
        trajectory.append(z)
    return trajectory
