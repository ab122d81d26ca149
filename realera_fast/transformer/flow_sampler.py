"""Euler steps of a flow: what `FlowMatchEulerDiscreteScheduler` does, in the pipelines' settings.

    z_t = (1 - t) x + t e,    v = e - x,    z_s = z_t + (s - t) v

for an image x and noise e (Lipman et al., arXiv 2210.02747; Esser et al., arXiv 2403.03206).
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from realera_fast.models import PACKED, class_of, latent_shape, patch_side
from realera_fast.runtime import unwrapped
from realera_fast.transformer.shared_transformer import SharedTransformer
from realera_fast.unet import Sampler, config_of

_SCHEDULER = "FlowMatchEulerDiscreteScheduler"


def euler_of(scheduler: Any, model: Any, steps: int, latent_size: int | None) -> Any:
    """A copy of a flow-matching scheduler, set to so many steps as the model's pipeline sets it.

    Args:
        scheduler: diffusers' `FlowMatchEulerDiscreteScheduler`; unchanged.
        model: the transformer; how far time is shifted may depend on the size of its latents.
        latent_size: height and width of the latents; None is the model's own.

    Raises:
        TypeError: it is no scheduler.
        ValueError: it is another one, or one that does not lead from noise to an image.
    """
    config, name = config_of(scheduler), type(scheduler).__name__
    known = any(
        kind.__name__ == _SCHEDULER and kind.__module__.startswith("diffusers.")
        for kind in type(scheduler).__mro__
    )
    if not known:
        raise ValueError(
            f"scheduler: this model is a flow, and {name} is not {_SCHEDULER}, whose steps noise "
            f"alignment takes; pass {_SCHEDULER}.from_config(pipe.scheduler.config)"
        )
    if config.get("invert_sigmas"):
        raise ValueError(
            f"scheduler: {name} leads from an image to noise (invert_sigmas); pass the scheduler "
            "that the model was trained with"
        )
    count = int(config["num_train_timesteps"])
    if steps > count:
        raise ValueError(
            f"AlignmentConfig: {steps} denoising steps are too many for the {count} time steps of "
            "the scheduler; lower sampling_steps and check_sampling_steps"
        )
    own = copy.deepcopy(scheduler)
    _, height, width = latent_shape(model, latent_size)
    patch = patch_side(model)
    # FLUX's pipeline spaces the steps itself, unless the scheduler says how.
    spaced = class_of(unwrapped(model)) == PACKED and not config.get("use_flow_sigmas")
    sigmas = torch.linspace(1.0, 1.0 / steps, steps, dtype=torch.float64, device="cpu").tolist()
    own.set_timesteps(
        steps,
        sigmas=sigmas if spaced else None,
        mu=_shift(config, (height // patch) * (width // patch)),
    )
    return own


def _shift(config: Any, tokens: int) -> float:
    """How far time is shifted for pictures of so many tokens: on the line between two sizes."""
    few, many = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    slope = (high - low) / (many - few)
    return float(tokens * slope + (low - slope * few))


class EulerSampler(Sampler):
    """Euler steps with a transformer."""

    def __init__(
        self,
        shared: SharedTransformer,
        scheduler: Any,
        empty: Tensor,
        *,
        steps: int,
        guidance_scale: float,
        latent_size: int | None,
        batch_size: int,
    ) -> None:
        """
        Args:
            scheduler: diffusers' `FlowMatchEulerDiscreteScheduler`; unchanged.
            guidance_scale: of classifier-free guidance, which Stable Diffusion 3 takes above 1, as
                its pipeline has it. FLUX.1 takes none; dev is told the scale as an input
                (`SharedTransformer`).
        """
        super().__init__(shared, empty, guidance_scale=guidance_scale, batch_size=batch_size)
        model = shared.transformer
        self.scheduler = euler_of(scheduler, model, steps, latent_size)
        self._timesteps = self.scheduler.timesteps.to(shared.device)
        self._sigmas = self.scheduler.sigmas.to(shared.device)
        self.train_timesteps = int(self.scheduler.config.num_train_timesteps)
        self.shape = latent_shape(model, latent_size)
        self._guided = class_of(model) != PACKED and guidance_scale > 1.0

    @property
    def timesteps(self) -> Tensor:
        """`[s]` float32, those of a trajectory, from noise to image, on the model's device."""
        return self._timesteps

    @property
    def is_guided(self) -> bool:
        """Whether a step is guided away from the empty prompt, with two passes."""
        return self._guided

    def step(self, prediction: Tensor, number: int, latents: Tensor) -> Tensor:
        """`[b, c, h, w]` latents after the step of that number."""
        return latents + (self._sigmas[number + 1] - self._sigmas[number]) * prediction

    def noised(self, images: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """`[b, c, h, w]` clean latents with as much noise as there is at `[b]` time steps."""
        share = (timesteps.to(images.dtype) / self.train_timesteps)[:, None, None, None]
        return (1.0 - share) * images + share * noise

    def goal(self, images: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The velocity, which the model was trained to predict."""
        return noise - images

    def time_at(self, share: float) -> Tensor:
        """Time step at that share of the schedule (0 is the image, 1 is noise)."""
        step = self.train_timesteps * share
        return torch.tensor(step, dtype=torch.float32, device=self.shared.device)
