"""What moves the prompts that the student is trained on: noise, or the worst neighbor.

The paper draws neighbors at random (RealEra, arXiv 2410.09140). What an attack finds is the worst
of them: where the edited model still predicts what the original does. One signed gradient step
finds it (the projected gradient descent of Madry et al., arXiv 1706.06083, on the text embedding as
RACE has it, arXiv 2405.16341), at the z_t that is trained on, so that the teacher's predictions
serve again and nothing is denoised anew.
"""

from __future__ import annotations

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
        size = states[:, 1:].float().square().mean(dim=(1, 2), keepdim=True).sqrt()
        # A sign in every element: so long a step is as long as the region is wide.
        length = self.region.max_distance * size
        if self.steps > 1:
            length = length * _OVERSHOOT / self.steps
        for _ in range(self.steps):
            _, gradient = self.shared.error_gradient(latents, timesteps, points, shown, variant)
            # The sign of NaN is 0: this keeps what is not finite, and the loss tells.
            step = length * (gradient.sign() + 0.0 * gradient)
            # Begin-of-text is the same row in every prompt.
            step[:, 0] = 0.0
            points = mining.retract(points.float() - step, states.float(), self.region)
            points = points.to(states.dtype)
        return points


def worst_neighbor(
    shared: SharedDenoiser, config: AlignmentConfig, mining_config: MiningConfig
) -> Adversary:
    """The adversary "worst" of these settings."""
    region = Region(mining_config.min_cosine, 1.0, config.adversary_distance)
    return Adversary(shared, region, config.adversary_steps)


def adversary_of(
    shared: SharedDenoiser, config: AlignmentConfig, mining_config: MiningConfig
) -> Adversary | None:
    """What the settings ask for; None where prompts stay as they are."""
    if config.adversary == "none":
        return None
    if config.adversary == "random":
        return Adversary(shared, mining_config.neighbor_region, 0)
    return worst_neighbor(shared, config, mining_config)
