"""ESD (Gandikota et al., arXiv 2303.07345): fine-tuning away from the concept.

    | eps'(x_t, c) - (eps(x_t, c) - eta (eps(x_t, c) - eps(x_t, ""))) |^2

with eta as the published code counts it, one more than the paper's. x_t is denoised by the model as
it is trained, up to a random step, as in the paper (the published code takes the original model);
nothing is preserved. Trained are the cross-attention projections ("esd-x"), or of a U-Net all else
("esd-u", the authors' for objects); of joint attention those of the text (`add_q_proj`,
`add_k_proj`, `add_v_proj`), in velocities. Several x_t are
denoised together, for as many iterations: the published code denoises one anew for each, which is
most of its time.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from baselines.training import Copies, Trajectories, denoiser, encode, predict, trained
from realera_fast.text import Concept


@dataclass(frozen=True)
class Settings:
    """Defaults: the authors'."""

    iterations: int = 200
    learning_rate: float = 5e-5
    negative_guidance: float = 2.0
    """eta."""
    guidance_scale: float = 3.0
    sampling_steps: int = 50
    unconditional: bool = False
    """"esd-u" in place of "esd-x"."""
    together: int = 10
    """x_t denoised at a time, and iterations that use them (ours; 1 is the published code)."""


SWEEP = (
    Settings(),
    Settings(negative_guidance=3.0),
    Settings(negative_guidance=3.0, sampling_steps=20),
    Settings(negative_guidance=3.0, sampling_steps=20, learning_rate=2e-4),
    Settings(sampling_steps=20, learning_rate=2e-4),
    Settings(sampling_steps=20, unconditional=True),
    Settings(negative_guidance=3.0, sampling_steps=20, unconditional=True),
    Settings(sampling_steps=20, learning_rate=1e-5, unconditional=True),
)
"""What is tried on words that are not judged; the authors' settings come first."""


def erase(pipe: Any, concepts: Sequence[Concept], settings: Settings, seed: int = 0) -> None:
    """Trains every projection of cross-attention, or all else; of several words one at random an
    iteration."""
    words = [word for concept in concepts for word in concept.words]
    parts = (".attn2.", ".add_")
    weights = [
        parameter
        for name, parameter in denoiser(pipe).named_parameters()
        if any(part in name for part in parts) != settings.unconditional
    ]
    generator = torch.Generator().manual_seed(seed)
    fine_tune(pipe, encode(pipe, ["", *words]), weights, settings, generator)


def fine_tune(
    pipe: Any,
    states: Tensor,
    weights: Sequence[nn.Parameter],
    settings: Settings,
    generator: torch.Generator,
) -> None:
    """Trains weights of the denoiser away from embeddings.

    Args:
        states: `[1 + words, tokens, d]`: the empty prompt, then what is to go.
    """
    unet = denoiser(pipe)
    teacher = copy.deepcopy(unet).requires_grad_(False)
    optimizer = Copies(weights, torch.optim.Adam, lr=settings.learning_rate)
    trajectories = Trajectories(
        pipe,
        states,
        generator,
        steps=settings.sampling_steps,
        guidance_scale=settings.guidance_scale,
        together=settings.together,
    )
    with trained(unet, weights):
        for _ in range(settings.iterations):
            noised = trajectories.take()
            x, t, named = noised.x, noised.t, states[noised.word]
            with torch.no_grad():
                both = torch.cat([states[:1], named])
                free, guided = predict(teacher, torch.cat([x, x]), t.repeat(2), both).chunk(2)
                wanted = guided - settings.negative_guidance * (guided - free)
            functional.mse_loss(predict(unet, x, t, named), wanted).backward()
            optimizer.step()
