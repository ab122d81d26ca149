"""RACE (Kim et al., ECCV 2024, arXiv 2405.16341): a finished ESD model, trained against the worst
embedding near the concept's.

    | eps'(z_t, t, c*) - (eps(z_t, t, "") - eta (eps(z_t, t, c) - eps(z_t, t, ""))) |^2

    c* = argmin over |c' - c|_inf <= epsilon of | eps'(z_t, t, c') - eps |^2

The adversary is projected gradient descent (Madry et al., arXiv 1706.06083) at one time step: eps
is the noise that z_t comes from. Their optional L1 term, which holds weights near the original's,
is left out.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from baselines import esd
from baselines.training import Copies, Noised, Trajectories, encode, noise_in, predict, trained
from realera_fast.text import Concept


@dataclass(frozen=True)
class Settings:
    """Defaults: the authors' but for budgets, which a small model on a CPU needs smaller."""

    defaults: ClassVar[str] = "the authors' with smaller budgets"

    start: esd.Settings = esd.Settings(iterations=60, sampling_steps=20, learning_rate=2e-4)
    """The ESD model that it starts from; theirs is the published one, of 1,000 iterations."""
    iterations: int = 24
    """Theirs: 1,000."""
    batch_size: int = 4
    """z_t of an iteration. Theirs: 1."""
    learning_rate: float = 2e-4
    """Adam's. Theirs: 1e-5, forty times as many steps."""
    negative_guidance: float = 1.0
    """eta."""
    adversary_steps: int = 10
    """Each epsilon / 4 long, from a random start."""
    adversary_distance: float = 0.1
    """epsilon, in units of the embedding's root mean square, which is 1 in Stable Diffusion."""
    guidance_scale: float = 3.0
    sampling_steps: int = 20
    """Theirs: 50."""


SWEEP = (
    Settings(),
    Settings(learning_rate=2e-5),
    Settings(learning_rate=5e-5),
    Settings(learning_rate=5e-4),
)
"""What is tried on words that are not judged."""


def erase(pipe: Any, concepts: Sequence[Concept], settings: Settings, seed: int = 0) -> None:
    """Trains every projection of cross-attention, first as ESD does."""
    unet = pipe.unet
    teacher = copy.deepcopy(unet).requires_grad_(False)
    esd.erase(pipe, concepts, settings.start, seed)
    states = encode(pipe, ["", *(word for concept in concepts for word in concept.words)])
    weights = [p for name, p in unet.named_parameters() if ".attn2." in name]
    generator = torch.Generator().manual_seed(seed)
    optimizer = Copies(weights, torch.optim.Adam, lr=settings.learning_rate)
    trajectories = Trajectories(
        pipe,
        states,
        generator,
        steps=settings.sampling_steps,
        guidance_scale=settings.guidance_scale,
        together=3 * settings.batch_size,
    )
    with trained(unet, weights):
        for _ in range(settings.iterations):
            noised = trajectories.take(settings.batch_size)
            x, t, named = noised.x, noised.t, states[noised.word]
            with torch.no_grad():
                both = torch.cat([states[:1].expand(len(x), -1, -1), named])
                free, shown = predict(teacher, torch.cat([x, x]), t.repeat(2), both).chunk(2)
                wanted = free - settings.negative_guidance * (shown - free)
            moved = worst(pipe, noised, named, settings, generator)
            functional.mse_loss(predict(unet, x, t, moved), wanted).backward()
            optimizer.step()


def worst(
    pipe: Any, noised: Noised, states: Tensor, settings: Settings, generator: torch.Generator
) -> Tensor:
    """`[b, tokens, d]` float32: the embeddings near these which explain the noise best.

    Args:
        states: `[b, tokens, d]` of the concept.
    """
    center = states.float()
    distance = settings.adversary_distance * float(center.square().mean().sqrt())
    low, high = float(center.min()), float(center.max())
    jump = 2 * torch.rand(center.shape, generator=generator).to(center.device) - 1
    points = (center + distance * jump).clamp(low, high)
    for _ in range(settings.adversary_steps):
        points.requires_grad_(True)
        out = predict(pipe.unet, noised.x, noised.t, points)
        error = (noise_in(pipe.scheduler, out, noised.x, noised.t) - noised.start).square()
        # Rows do not meet: the sum gives each its own gradient.
        (gradient,) = torch.autograd.grad(error.sum(), [points])
        points = points.detach() - distance / 4 * gradient.sign()
        points = (center + (points - center).clamp(-distance, distance)).clamp(low, high)
    return points
