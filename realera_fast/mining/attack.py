"""Prompts that bring a concept back: found by attacking the edited model with its own gradients.

An edit that moves all words of a concept still answers to prompts that no word makes. Free token
vectors v stand for the name, and follow

    min_v | eps'(z_t, t, f(v)) - eps(z_t, t, f(name)) |^2

at z_t on the original model's way to the concept (after Pham et al., arXiv 2308.01508, and
UnlearnDiffAtk, arXiv 2310.11868). What they find is erased as well, as STEREO does with words that
it inverts (arXiv 2408.16807): docs/method.md, section 6.5.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from realera_fast.text import FreePrompts, Text
from realera_fast.unet import Sampler, SharedDenoiser, Variant

_STEP = 0.03
"""Adam's step, in units of the root mean square of the encoder's own token vectors (ours)."""
_LAST_STEP = 0.1
"""The last step's share of that; in between it falls linearly."""
_APART = 0.1
"""Noise that tells prompts apart, in the same units (ours)."""
_TINY = 2.0**-100
ATTACK_POINTS = 2
"""Points of trajectories that a prompt is compared at in a step (count; ours)."""
ATTACK_TRAJECTORIES = 24
"""Starts that the original model denoises to the concept (count; ours)."""


@dataclass(frozen=True)
class AttackPoints:
    """Where an attack compares predictions, and what the original model predicts there.

    On the CPU: there may be many concepts.
    """

    latents: Tensor
    """`[e, c, h, w]` float32."""
    timesteps: Tensor
    """`[e]` integer, of a flow float32."""
    shown: Tensor
    """`[e, c, h, w]` float32."""


def points_of(sampler: Sampler, states: Tensor, seeds: Sequence[int], bar: Any) -> AttackPoints:
    """All points of trajectories on which the original model draws a prompt.

    Args:
        states: `[t, d]` the prompt.
        seeds: of the starts.
    """
    way = sampler.run(states.expand(len(seeds), -1, -1), seeds, "original", bar)
    return AttackPoints(
        way.latents[:-1].flatten(0, 1).cpu(),
        way.timesteps.repeat_interleave(len(seeds)).cpu(),
        way.predictions.flatten(0, 1).cpu(),
    )


@dataclass(frozen=True)
class Attacked:
    """The outcome of an attack."""

    prompts: FreePrompts
    errors: Tensor
    """`[2, j]` float32 mean squared error of each prompt's first and last predictions: where the
    last is small, the concept is back."""


def attack(
    shared: SharedDenoiser,
    text: Text,
    prompts: FreePrompts,
    points: AttackPoints,
    *,
    variant: Variant = "edited",
    steps: int,
    seeds: Sequence[int],
    bar: Any,
) -> Attacked:
    """Prompts at which the edited model predicts what the original does for the concept.

    Each follows its own random numbers, so that what it finds does not depend on the others.

    Args:
        shared: installed.
        text: encodes prompts as the denoiser is shown them.
        prompts: where the attack begins.
        variant: what is attacked.
        steps: of the optimizer.
        seeds: one for each prompt.

    Raises:
        FloatingPointError: a prediction or a gradient is not finite.
    """
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    tables = {model.encoder: model.input_embeddings for model in text.models}
    vectors, sizes = [], []
    for encoder, start in prompts.vectors.items():
        size = float(tables[encoder].detach().float().square().mean().sqrt())
        noise = [torch.randn(start.shape[1:], device="cpu", generator=g) for g in generators]
        begin = start + _APART * size * torch.stack(noise).to(start)
        vectors.append(begin.requires_grad_())
        sizes.append(size)
    optimizer = torch.optim.Adam(
        [{"params": [v], "lr": _STEP * s} for v, s in zip(vectors, sizes, strict=True)]
    )
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, _LAST_STEP, max(1, steps))
    measured = []
    for _ in range(steps):
        drawn = [
            torch.randint(len(points.latents), (ATTACK_POINTS,), device="cpu", generator=g)
            for g in generators
        ]
        index = torch.cat(drawn)
        with torch.enable_grad():
            states = text.encode_free(prompts.with_vectors(vectors))
        errors, gradient = shared.error_gradient(
            points.latents[index].to(shared.device),
            points.timesteps[index].to(shared.device),
            states.detach().repeat_interleave(ATTACK_POINTS, dim=0),
            points.shown[index].to(shared.device),
            variant,
        )
        gradient = gradient.unflatten(0, (-1, ATTACK_POINTS)).mean(1)
        if not bool(torch.isfinite(gradient).all() and torch.isfinite(errors).all()):
            raise FloatingPointError("an attack's gradient is not finite")
        # A half-precision encoder would lose small numbers; a power of two loses none.
        unit = torch.exp2(gradient.abs().amax().clamp_min(_TINY).log2().floor())
        found = torch.autograd.grad(states, vectors, (gradient / unit).to(states))
        for vector, slope in zip(vectors, found, strict=True):
            vector.grad = slope * unit.to(slope)
        optimizer.step()
        schedule.step()
        measured.append(errors.unflatten(0, (-1, ATTACK_POINTS)).mean(1))
        bar.update(1)
    few = max(1, steps // 10)
    ends = [torch.stack(part).mean(0).float() for part in (measured[:few], measured[-few:])]
    return Attacked(prompts.with_vectors(v.detach() for v in vectors), torch.stack(ends))
