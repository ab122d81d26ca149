"""What moves the prompts that the student is trained on: noise, or the worst neighbor.

The paper draws neighbors at random (RealEra, arXiv 2410.09140). What an attack finds is the worst
of them: where the edited model still predicts what the original does. One signed gradient step
finds it (the projected gradient descent of Madry et al., arXiv 1706.06083, on the text embedding as
RACE has it, arXiv 2405.16341), at the z_t that is trained on, so that the teacher's predictions
serve again and nothing is denoised anew.
"""

from __future__ import annotations

import torch
from torch import Tensor

from realera_fast import mining
from realera_fast.alignment.config import AlignmentConfig
from realera_fast.mining import MiningConfig, Region
from realera_fast.unet import SharedDenoiser, Variant

_OVERSHOOT = 2.5
"""Several steps are together so many times as long as the region is wide (Madry et al.)."""


class Adversary:
    """Moves prompts inside a region around them."""

    def __init__(self, shared: SharedDenoiser, region: Region, steps: int) -> None:
        """
        Args:
            region: where the prompts may go.
            steps: signed gradient steps; 0 draws at random alone.
        """
        self.shared, self.region, self.steps = shared, region, steps

    def moved(
        self,
        latents: Tensor,
        timesteps: Tensor,
        states: Tensor,
        shown: Tensor | None,
        *,
        seed: int,
        offset: int = 0,
        variant: Variant = "aligned",
    ) -> Tensor:
        """`[b, t, d]` prompts at which the student's prediction is near `shown`.

        Args:
            latents, timesteps: `[b, c, h, w]` and `[b]` where they are compared.
            states: `[b, t, d]` the prompts.
            shown: `[b, c, h, w]` what the original model predicts for them; without steps not
                needed.
            seed: of the start; row i draws number `offset + i` of it.
            variant: the student.
        """
        points = mining.sample(
            states, self.region, samples=1, seed=seed, concept_offset=offset
        ).rows()[:, 0]
        if not self.steps:
            return points
        assert shown is not None
        # Several steps are together longer than the region is wide.
        length = _OVERSHOOT / self.steps if self.steps > 1 else 1.0
        for _ in range(self.steps):
            _, gradient = self.shared.error_gradient(latents, timesteps, points, shown, variant)
            points = _signed_step(points, gradient, states, self.region, length)
        return points


class AdversarialTarget:
    """Moves the concept that a target leads away from to what the student still shows of it.

    AEGIS (see docs/method.md, section 6.1) moves the prompt of the target so that its prediction by
    the original comes nearer to the student's and to the concept's own.
    """

    def __init__(self, shared: SharedDenoiser, region: Region, negative_guidance: float) -> None:
        """
        Args:
            region: where the prompt may go.
            negative_guidance: g of the target.
        """
        self.shared, self.region, self.guidance = shared, region, negative_guidance

    def goal(
        self,
        latents: Tensor,
        timesteps: Tensor,
        states: Tensor,
        goal: Tensor,
        shown: Tensor,
        *,
        asked: Tensor,
    ) -> Tensor:
        """`[b, c, h, w]` goals that lead away from the moved prompts.

        Args:
            latents, timesteps: `[b, c, h, w]` and `[b]` where they are compared.
            states: `[b, t, d]` the prompts that move.
            goal: `[b, c, h, w]` the goals that lead away from `shown`.
            shown: `[b, c, h, w]` what the original predicts for the concept.
            asked: `[b, t, d]` the prompts that the student is shown.
        """
        with torch.no_grad():
            prompts = self.shared.condition(asked, "aligned")
            student = self.shared.predict(latents, timesteps, prompts)
            # |x - s|^2 + |x - c|^2 is least where x is nearest to the middle of both.
            middle = (student + shown.to(student)) / 2
        before, gradient = self.shared.error_gradient(
            latents, timesteps, states, middle, "original"
        )
        points = _signed_step(states, gradient, states, self.region, 1.0)
        with torch.no_grad():
            prompts = self.shared.condition(points, "original")
            moved = self.shared.predict(latents, timesteps, prompts)
        after = (moved - middle).square().flatten(1).mean(dim=1)
        concept = torch.where((after < before)[:, None, None, None], moved, shown.to(moved))
        return goal + self.guidance * (shown - concept.to(shown))


def _signed_step(
    points: Tensor, gradient: Tensor, center: Tensor, region: Region, length: float
) -> Tensor:
    """`[b, t, d]` points after a step down the gradient's signs, back in the region.

    Args:
        center: `[b, t, d]` what each lies around.
        length: 1 is a step as long as the region is wide.
    """
    # A sign in every element.
    size = center[:, 1:].float().square().mean(dim=(1, 2), keepdim=True).sqrt()
    # The sign of NaN is 0: this keeps what is not finite, and the loss tells.
    step = length * region.max_distance * size * (gradient.sign() + 0.0 * gradient)
    # Begin-of-text is the same row in every prompt.
    step[:, 0] = 0.0
    return mining.retract(points.float() - step, center.float(), region).to(center.dtype)


def worst_neighbor(
    shared: SharedDenoiser, config: AlignmentConfig, mining_config: MiningConfig
) -> Adversary:
    """The adversary "worst" of these settings."""
    return Adversary(shared, _reach(config, mining_config), config.adversary_steps)


def adversarial_target_of(
    shared: SharedDenoiser, config: AlignmentConfig, mining_config: MiningConfig
) -> AdversarialTarget | None:
    """What moves the targets; None where they stay."""
    if config.loss != "adversarial_target":
        return None
    return AdversarialTarget(shared, _reach(config, mining_config), config.negative_guidance)


def _reach(config: AlignmentConfig, mining_config: MiningConfig) -> Region:
    """Where an adversary may go."""
    return Region(mining_config.min_cosine, 1.0, config.adversary_distance)


def adversary_of(
    shared: SharedDenoiser, config: AlignmentConfig, mining_config: MiningConfig
) -> Adversary | None:
    """What the settings ask for; None where prompts stay as they are."""
    if config.adversary == "none":
        return None
    if config.adversary == "random":
        return Adversary(shared, mining_config.neighbor_region, 0)
    return worst_neighbor(shared, config, mining_config)
