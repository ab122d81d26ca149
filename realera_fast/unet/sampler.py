"""Deterministic sampling of the original and of the edited model."""

from __future__ import annotations

import abc
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias

import torch
from torch import Tensor

from realera_fast.unet.denoiser import SharedDenoiser, Variant
from realera_fast.unet.shared_unet import SharedUNet

_MARGIN_STEPS = 8
"""Noise levels at which two prompts are compared."""


@dataclass(frozen=True)
class Trajectories:
    """Denoising from b starts in s steps."""

    latents: Tensor
    """`[s + 1, b, c, h, w]` from noise to image."""
    predictions: Tensor
    """`[s, b, c, h, w]` the model's prediction for the prompt, without guidance."""
    timesteps: Tensor
    """`[s]`."""


def config_of(scheduler: Any) -> Mapping[str, Any]:
    """The configuration of a diffusers scheduler.

    Raises:
        TypeError: it is none.
    """
    config = getattr(scheduler, "config", None)
    if isinstance(scheduler, type) or not isinstance(config, Mapping):
        name = type(scheduler).__name__
        got = f"the class {scheduler.__name__}" if isinstance(scheduler, type) else name
        raise TypeError(
            f"scheduler: expected a diffusers scheduler such as pipe.scheduler, got {got}; make "
            "one with DDIMScheduler.from_config(...) or .from_pretrained(...)"
        )
    return config


_PREDICTIONS = ("epsilon", "v_prediction", "sample")
_NOTHING = 2.0**-24
"""What some schedulers of diffusers write for a share of zero, so that they can divide by it."""


def _is_schedule(alphas: Any) -> bool:
    """Whether these are shares of the image, less at the end than at the beginning."""
    if not isinstance(alphas, Tensor) or alphas.dim() != 1 or len(alphas) < 2:
        return False
    return bool(((alphas >= 0.0) & (alphas <= 1.0)).all() & (alphas[0] > alphas[-1]))


def ddim_of(scheduler: Any, steps: int) -> Any:
    """A `DDIMScheduler`, set to so many steps, that noises as another scheduler does.

    The values of the noise schedule itself are taken over, so that whatever their class makes of
    its configuration (zero terminal SNR, shifts, trained betas) holds here too. How its own sampler
    goes through them (Karras sigmas, orders, few steps) does not matter: a U-Net sees only the
    noise level and its number.

    Args:
        scheduler: a diffusers scheduler with `alphas_cumprod`, the `[t]` shares of the image in
            the variance; unchanged.

    Raises:
        TypeError: it is no scheduler.
        ValueError: it noises in another way, or predicts what is not known here.
    """
    from diffusers import DDIMScheduler

    config, name = config_of(scheduler), type(scheduler).__name__
    alphas: Any = getattr(scheduler, "alphas_cumprod", None)
    flows = config.get("use_flow_sigmas") or config.get("timestep_type") == "continuous"
    if flows or not _is_schedule(alphas):
        raise ValueError(
            f"scheduler: {name} has no noise schedule of betas and numbered time steps (flow "
            "matching, EDM or another process); pass the scheduler that the U-Net was trained with"
        )
    kind = config.get("prediction_type")
    if kind not in _PREDICTIONS:
        raise ValueError(
            f"scheduler: {name} says prediction_type={kind!r}, expected one of {_PREDICTIONS}; "
            "pass a scheduler that says what the U-Net predicts"
        )
    count = len(alphas)
    betas: Any = getattr(scheduler, "betas", None)
    if betas is None:
        betas = 1.0 - alphas / torch.cat((torch.ones_like(alphas[:1]), alphas[:-1]))
    if steps <= count:
        # Not from_config: that drops what the other class has by default, and what is said here.
        known = inspect.signature(DDIMScheduler).parameters
        spacing = config.get("timestep_spacing")
        own: Any = DDIMScheduler(
            **{key: value for key, value in config.items() if key in known}
            | {
                "num_train_timesteps": count,
                # Some schedules by name are not known to this class.
                "trained_betas": betas.tolist(),
                # DDIM's step back is an n-th of the schedule: that fits only these two.
                "timestep_spacing": "trailing" if spacing == "trailing" else "leading",
                "clip_sample": False,
                "thresholding": False,
            }
        )
        own.betas, own.alphas = betas, 1.0 - betas
        own.alphas_cumprod = alphas.detach().to("cpu", torch.float32, copy=True)
        if not own.config.set_alpha_to_one:
            own.final_alpha_cumprod = own.alphas_cumprod[0]
        own.set_timesteps(steps)
    if steps > count or int(own.timesteps.max()) >= count:
        raise ValueError(
            f"AlignmentConfig: {steps} denoising steps are too many for the {count} time steps of "
            "the scheduler; lower sampling_steps and check_sampling_steps"
        )
    if kind == "epsilon" and bool((own.alphas_cumprod[own.timesteps] <= _NOTHING).any()):
        raise ValueError(
            f"scheduler: {name} begins with nothing of the picture (rescale_betas_zero_snr, or a "
            "cosine schedule), where the noise says nothing; pass the scheduler that the U-Net was "
            "trained with, such as one with prediction_type='v_prediction' or "
            "timestep_spacing='leading'"
        )
    return own


Moved: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Prompts `[b, t, d]` of latents `[b, c, h, w]`, time steps `[b]` and prompts."""


class SamplingOptions(Protocol):
    """Settings of sampling, which mining and alignment share."""

    @property
    def latent_size(self) -> int | None: ...

    @property
    def mixed_precision(self) -> Literal["no", "bf16"]: ...

    @property
    def guidance_scale(self) -> float: ...

    @property
    def sampling_batch_size(self) -> int: ...


class Sampler(abc.ABC):
    """Denoises with a model alone, without a pipeline, in batches of bounded size."""

    shape: tuple[int, int, int]
    """Channels, height and width of the latents."""
    train_timesteps: int
    """Length of the schedule."""

    def __init__(
        self, shared: SharedDenoiser, empty: Tensor, *, guidance_scale: float, batch_size: int
    ) -> None:
        """
        Args:
            empty: `[1, t, d]` embedding of the empty prompt, for guidance.
            batch_size: rows that go through the model at a time.
        """
        self.shared, self.empty, self.guidance_scale = shared, empty, guidance_scale
        self.batch_size = batch_size

    @property
    @abc.abstractmethod
    def timesteps(self) -> Tensor:
        """`[s]` those of a trajectory, from noise to image, on the model's device."""

    @abc.abstractmethod
    def step(self, prediction: Tensor, number: int, latents: Tensor) -> Tensor:
        """`[b, c, h, w]` latents after the step of that number."""

    @abc.abstractmethod
    def noised(self, images: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """`[b, c, h, w]` clean latents with as much noise as there is at `[b]` time steps."""

    @abc.abstractmethod
    def goal(self, images: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the model was trained to predict for `noised`."""

    @abc.abstractmethod
    def time_at(self, share: float) -> Tensor:
        """Time step at that share of the schedule (0 is the image, 1 is noise)."""

    @property
    def is_guided(self) -> bool:
        """Whether a step is guided away from the empty prompt, with two passes."""
        return True

    @property
    def passes(self) -> int:
        """Steps of one batch of starts."""
        return len(self.timesteps)

    @property
    def _starts(self) -> int:
        """Starts that are denoised together."""
        return max(1, self.batch_size // 2) if self.is_guided else self.batch_size

    def batches(self, starts: int) -> int:
        """Batches that so many starts are denoised in."""
        return -(-starts // self._starts)

    @torch.no_grad()
    def run(
        self,
        states: Tensor,
        seeds: Sequence[int],
        variant: Variant,
        bar: Any,
        moved: Moved | None = None,
    ) -> Trajectories:
        """Denoises one start for each prompt.

        Every start has its own generator, so an image does not depend on its neighbors in a batch.

        Args:
            states: `[b, t, d]`.
            seeds: of the b starts.
            moved: what becomes of the prompts at each time step; None leaves them.
        """
        size = self._starts
        parts = [
            self._batch(states[i : i + size], seeds[i : i + size], variant, bar, moved)
            for i in range(0, len(states), size)
        ]
        return Trajectories(
            torch.cat([way for way, _ in parts], dim=1),
            torch.cat([predicted for _, predicted in parts], dim=1),
            self.timesteps,
        )

    def _batch(
        self,
        states: Tensor,
        seeds: Sequence[int],
        variant: Variant,
        bar: Any,
        moved: Moved | None,
    ) -> tuple[Tensor, Tensor]:
        latents = self.noise(seeds)
        states = states.to(latents.device)
        empty = self.empty.to(states).expand(len(states) if self.is_guided else 0, -1, -1)
        prompts = self.shared.condition(torch.cat([empty, states]), variant)
        way, predictions = [latents], []
        for number, timestep in enumerate(self.timesteps):
            if moved is not None:
                own = moved(latents, timestep.expand(len(latents)), states)
                prompts = self.shared.condition(torch.cat([empty, own.to(states)]), variant)
            rows = torch.cat([latents, latents]) if self.is_guided else latents
            prediction = self.shared.predict(rows, timestep.expand(len(rows)), prompts)
            guided = prediction
            if self.is_guided:
                free, guided = prediction.chunk(2)
                prediction = free + self.guidance_scale * (guided - free)
            latents = self.step(prediction, number, latents)
            way.append(latents)
            predictions.append(guided)
            bar.update(1)
        return torch.stack(way), torch.stack(predictions)

    def noise(self, seeds: Sequence[int]) -> Tensor:
        """`[b, c, h, w]` float32 starts."""
        starts = [
            torch.randn(
                self.shape,
                dtype=torch.float32,
                device="cpu",
                generator=torch.Generator("cpu").manual_seed(seed),
            )
            for seed in seeds
        ]
        return torch.stack(starts).to(self.shared.device)

    @torch.no_grad()
    def teacher(self, latents: Tensor, timesteps: Tensor, states: Tensor) -> Tensor:
        """`[e, c, h, w]` what the original model predicts."""
        found = []
        for rows in torch.arange(len(latents), device=latents.device).split(self.batch_size):
            prompts = self.shared.condition(states[rows], "original")
            found.append(self.shared.predict(latents[rows], timesteps[rows], prompts))
        return torch.cat(found) if found else latents

    @torch.no_grad()
    def margin(self, images: Tensor, first: Tensor, second: Tensor) -> Tensor:
        """`[b]` how much better the original model denoises images with one prompt than another.

        A diffusion model's own zero-shot classifier (Li et al., arXiv 2303.16203): the difference
        of mean squared errors, positive where `first` fits better. Noise and time steps are the
        same for every image.

        Args:
            images: `[b, c, h, w]` clean latents.
            first, second: `[b, t, d]` prompts.
        """
        total = torch.zeros(len(images), dtype=torch.float32, device=images.device)
        for number in range(_MARGIN_STEPS):
            # The middle of the schedule: early steps hold no content, late ones only texture.
            time = self.time_at(0.2 + 0.6 * (number + 0.5) / _MARGIN_STEPS)
            noise = self.noise([number])
            noise = noise.expand_as(images)
            times = time.to(images.device).expand(len(images))
            noisy = self.noised(images, noise, times)
            goal = self.goal(images, noise, times)
            errors = [
                (self.teacher(noisy, times, states.to(noisy.device)) - goal).square().flatten(1)
                for states in (second, first)
            ]
            total += errors[0].mean(1) - errors[1].mean(1)
        return total / _MARGIN_STEPS


class DDIMSampler(Sampler):
    """DDIM with a U-Net."""

    def __init__(
        self,
        shared: SharedUNet,
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
            scheduler: a diffusers scheduler; only its noise schedule is used (`ddim_of`).
        """
        super().__init__(shared, empty, guidance_scale=guidance_scale, batch_size=batch_size)
        self.scheduler = ddim_of(scheduler, steps)
        self.scheduler.timesteps = self.scheduler.timesteps.to(shared.device)
        self.train_timesteps = int(self.scheduler.config.num_train_timesteps)
        config = shared.unet.config
        size = latent_size or config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        self.shape = (int(config.in_channels), int(height), int(width))

    @property
    def timesteps(self) -> Tensor:
        """`[s]` integer, those of a trajectory, from noise to image, on the model's device."""
        found: Tensor = self.scheduler.timesteps
        return found

    def step(self, prediction: Tensor, number: int, latents: Tensor) -> Tensor:
        """`[b, c, h, w]` latents after the step of that number."""
        after: Tensor = self.scheduler.step(prediction, self.timesteps[number], latents).prev_sample
        return after

    def noised(self, images: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """`[b, c, h, w]` clean latents with as much noise as there is at `[b]` time steps."""
        noisy: Tensor = self.scheduler.add_noise(images, noise, timesteps)
        return noisy

    def goal(self, images: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the U-Net was trained to predict."""
        kind = self.scheduler.config.prediction_type
        if kind == "v_prediction":
            velocity: Tensor = self.scheduler.get_velocity(images, noise, timesteps)
            return velocity
        return images if kind == "sample" else noise

    def time_at(self, share: float) -> Tensor:
        """Time step at that share of the schedule (0 is the image, 1 is noise)."""
        step = int(self.train_timesteps * share)
        return torch.tensor(step, dtype=torch.long, device=self.shared.device)
