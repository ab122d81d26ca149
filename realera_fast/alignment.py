"""Noise alignment: LoRA on the cross-attention projections (RealEra, stage 2).

    L = | eps'(z_t, t, E + eta) - eps(z_t, t, A) |^2              targets and neighbors
      + gamma   | eps'(z_t, t, E + eta') - eps(z_t, t, E + eta') |^2   beyond
      + gamma_p | eps'(z_t, t, P) - eps(z_t, t, P) |^2                 preserve

eps is the original U-Net and eps' the edited one: one module, whose projection weights are swapped
by reference and whose adapters are switched off for the teacher's pass. z_t comes from partly
denoising with the edited model; the whole trajectory of every start is kept and drawn from. At the
end both variants, closed form alone and with the adapters, draw held-back seeds of the *named*
words: the adapters stay only where they bring these closer to the anchor's pictures without moving
the preserved ones further (method: section 4, trap 1). Mining modes "covariance" and "offset" shape
the closed form alone: here their neighbors are drawn as in "gaussian".
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from realera_fast import lora, mining, ops, philox
from realera_fast import progress as progress_bars
from realera_fast.concept_map import ConceptMap
from realera_fast.lora import LoraFactors
from realera_fast.pairs import AlignedPrompts
from realera_fast.unet import projections

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class AlignmentConfig:
    """The LoRA stage. The paper publishes none of these values: all defaults are ours."""

    enabled: bool = True
    """Run the stage (default: yes, RealEra has two stages)."""

    steps: int = 60
    """Optimiser steps (count; MACE's LoRA stage takes 50 to 120)."""

    batch_size: int = 8
    """Target rows and as many preserve rows a step; half as many beyond rows (count; ours)."""

    rank: int = 4
    """LoRA rank r (ours; MACE uses 1)."""

    lora_alpha: float = 4.0
    """peft's `lora_alpha`; the factors are scaled by `lora_alpha / rank` (ours)."""

    learning_rate: float = 3e-4
    """AdamW step size, falling linearly to 0 over the steps (ours; MACE uses 1e-5 to 1e-4)."""

    beyond_scale: float = 0.5
    """gamma: weight of the beyond term (ratio; ours)."""

    preserve_scale: float = 1.0
    """gamma_p: weight of the preserve term (ratio; ours)."""

    negative_guidance: float = 0.0
    """g in the target eps(A) - g (eps(E) - eps(A)): 0 follows the anchor (ratio; ours)."""

    trajectories: int = 8
    """Starts denoised for targets, and as many for preserve prompts (count; ours)."""

    sampling_steps: int = 20
    """Denoising steps of a trajectory (count; ours)."""

    guidance_scale: float = 5.0
    """Classifier-free guidance of the trajectories (ratio; diffusers' SD default is 7.5)."""

    min_timestep: float = 0.0
    """Latest part of the schedule that is left out, as a fraction of it (0 to 1; ours)."""

    latent_size: int | None = None
    """Height and width of the latents in latent pixels; `None` is the U-Net's `sample_size`."""

    check_seeds: int = 2
    """Held-back starts for each checked prompt (count; ours); 0 keeps the adapters unchecked."""

    def __post_init__(self) -> None:
        for field in ("steps", "batch_size", "rank", "trajectories", "sampling_steps"):
            if getattr(self, field) < 1:
                raise ValueError(
                    f"AlignmentConfig.{field} must be >= 1, got {getattr(self, field)}"
                )
        for field in ("learning_rate", "lora_alpha"):
            if not getattr(self, field) > 0:
                raise ValueError(f"AlignmentConfig.{field} must be > 0, got {getattr(self, field)}")
        for field in ("beyond_scale", "preserve_scale", "negative_guidance", "check_seeds"):
            if not getattr(self, field) >= 0:
                raise ValueError(
                    f"AlignmentConfig.{field} must be >= 0, got {getattr(self, field)}"
                )
        if not 0.0 <= self.min_timestep < 1.0:
            raise ValueError(
                f"AlignmentConfig.min_timestep must be in [0, 1), got {self.min_timestep}"
            )


@dataclass(frozen=True)
class AlignmentScore:
    """Held-back pictures against the original model's, as fractions (0 is perfect)."""

    target: float
    """|x'(E) - x(A)|^2 / |x(E) - x(A)|^2 over named words: 1 where nothing was erased."""
    preserve: float
    """|x'(P) - x(P)|^2 over the spread of the original's pictures."""


@dataclass(frozen=True)
class Alignment:
    """The outcome of the stage."""

    lora: Mapping[str, LoraFactors]
    """Factors by projection name; empty where the closed form alone was better."""
    kept: bool
    closed_form: AlignmentScore | None
    aligned: AlignmentScore | None
    losses: tuple[float, ...]
    """Training loss of each step."""
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values for the report."""
        return {
            "kept": self.kept,
            "closed_form": None if self.closed_form is None else asdict(self.closed_form),
            "aligned": None if self.aligned is None else asdict(self.aligned),
            "first_loss": self.losses[0] if self.losses else None,
            "last_loss": self.losses[-1] if self.losses else None,
            "steps": len(self.losses),
            "seconds": self.seconds,
        }


class _Models:
    """The original and the edited U-Net in one module.

    Weights are exchanged by reference, so a switch costs nothing and the original tensors come back
    as the very same storage.
    """

    def __init__(self, unet: nn.Module, concept_map: ConceptMap) -> None:
        self.unet = unet
        self._modules = projections(unet)
        self._original = {name: module.weight.data for name, module in self._modules.items()}
        self._edited = {name: weight.clone() for name, weight in self._original.items()}
        if concept_map.rank:
            device = next(iter(self._edited.values())).device
            ops.low_rank_update_(
                list(self._edited.values()),
                concept_map.left.to(device),
                concept_map.right.to(device),
            )

    @property
    def names(self) -> list[str]:
        return list(self._modules)

    def _use(self, weights: Mapping[str, Tensor]) -> None:
        for name, module in self._modules.items():
            module.weight.data = weights[name]

    @contextlib.contextmanager
    def edited(self) -> Iterator[None]:
        """The edited weights for the length of the block; the original ones after it."""
        try:
            self._use(self._edited)
            yield
        finally:
            self._use(self._original)


@dataclass(frozen=True)
class _Buffer:
    """Points of denoising trajectories: `[e, ...]` latents and their time steps."""

    latents: Tensor
    timesteps: Tensor
    label: Tensor
    """`[e]` number of the word or prompt that the trajectory is of."""

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        index = torch.randint(len(self.latents), (count,), generator=generator)
        index = index.to(self.latents.device)
        return self.latents[index], self.timesteps[index], self.label[index]


class _Sampler:
    """DDIM trajectories of a U-Net, without a pipeline."""

    def __init__(self, unet: Any, scheduler: Any, config: AlignmentConfig, empty: Tensor) -> None:
        from diffusers import DDIMScheduler

        self.unet = unet
        self.config = config
        self.empty = empty
        self.scheduler = DDIMScheduler.from_config(
            {**scheduler.config, "clip_sample": False, "thresholding": False}
        )
        weight = next(iter(projections(unet).values())).weight
        self.device, self.dtype = weight.device, weight.dtype
        size = config.latent_size or unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        self.shape = (int(unet.config.in_channels), int(height), int(width))

    def predict(self, latents: Tensor, timesteps: Tensor, states: Tensor) -> Tensor:
        """Noise prediction in float32; the U-Net computes in its own dtype."""
        return self.unet(
            latents.to(self.dtype), timesteps, encoder_hidden_states=states.to(self.dtype)
        ).sample.float()

    @torch.no_grad()
    def trajectories(self, states: Tensor, seeds: Sequence[int], bar: Any) -> tuple[Tensor, Tensor]:
        """Latents `[steps + 1, b, ...]` along the way and the time steps `[steps]`.

        Every start has its own generator, so a picture does not depend on its batch.
        """
        latents = torch.stack(
            [torch.randn(self.shape, generator=torch.Generator().manual_seed(s)) for s in seeds]
        ).to(self.device)
        self.scheduler.set_timesteps(self.config.sampling_steps, device=self.device)
        both = torch.cat([self.empty.expand(len(states), -1, -1), states])
        way = [latents]
        for timestep in self.scheduler.timesteps:
            free, guided = self.predict(
                torch.cat([latents, latents]), timestep.expand(2 * len(latents)), both
            ).chunk(2)
            noise = free + self.config.guidance_scale * (guided - free)
            latents = self.scheduler.step(noise, timestep, latents).prev_sample
            way.append(latents)
            bar.update(1)
        return torch.stack(way), self.scheduler.timesteps


def _buffer(
    sampler: _Sampler, states: Tensor, prompts: Tensor, labels: Tensor, seed: int, bar: Any
) -> _Buffer:
    """Trajectories of chosen prompts.

    Args:
        states: `[p, t, d]` all prompts.
        prompts: `[b]` numbers of the prompts that are denoised.
        labels: `[b]` what each point of their trajectories is labelled with.
    """
    config = sampler.config
    way, timesteps = sampler.trajectories(
        states[prompts.to(states.device)], range(seed, seed + len(prompts)), bar
    )
    last = sampler.scheduler.config.num_train_timesteps * config.min_timestep
    used = timesteps >= last
    return _Buffer(
        way[:-1][used].flatten(0, 1),
        timesteps[used].repeat_interleave(len(prompts)),
        labels.to(way.device).repeat(int(used.sum())),
    )


def _spread(pictures: Tensor) -> float:
    """Mean squared distance of pictures from their mean: the yardstick of the preserve score."""
    return float((pictures - pictures.mean(dim=0)).square().mean())


def align_noise(
    unet: Any,
    scheduler: Any,
    concept_map: ConceptMap,
    *,
    named: Sequence[AlignedPrompts],
    neighbors: Sequence[AlignedPrompts],
    preserve: Tensor,
    empty: Tensor,
    config: AlignmentConfig,
    mining_config: mining.MiningConfig,
    seed: int,
    progress: bool | None = None,
) -> Alignment:
    """Trains LoRA factors on top of the closed form; the U-Net is unchanged on return.

    Args:
        unet: the original `UNet2DConditionModel`.
        scheduler: its noise scheduler (a diffusers one; only its config is used).
        concept_map: the closed form, T = I + L R.
        named: prompts of the words that the user named.
        neighbors: prompts of mined neighbor words.
        preserve: `[p, t, d]` prompts that keep their prediction.
        empty: `[1, t, d]` embedding of the empty prompt, for guidance.
        seed: all randomness comes from it.
    """
    started = time.perf_counter()
    generator = torch.Generator().manual_seed(seed)
    models = _Models(unet, concept_map)
    sampler = _Sampler(unet, scheduler, config, empty)
    device = sampler.device
    moved = (*named, *neighbors)
    source = torch.cat([m.source for m in moved]).to(device)
    anchor = torch.cat([m.anchor for m in moved]).to(device)
    preserve, sampler.empty = preserve.to(device), empty.to(device)
    # First prompt and number of prompts of each word, named words first.
    sizes_of = torch.tensor([len(m.prompts) for m in moved], device=device)
    starts, counts = sizes_of.cumsum(0) - sizes_of, sizes_of
    scale = 2.0**14 if sampler.dtype == torch.float16 else 1.0
    training = {module: module.training for module in unet.modules()}
    unet.eval()
    losses: list[float] = []
    attached = False
    try:
        with (
            models.edited(),
            progress_bars.bar(
                total=2 * config.sampling_steps, desc="trajectories", progress=progress
            ) as bar,
        ):
            # Round-robin over words, named ones first, so that every one of these is trained on.
            target_count = max(config.trajectories, len(named))
            words = torch.arange(target_count) % len(moved)
            plain = starts.cpu() + torch.tensor([m.plain for m in moved])
            target_points = _buffer(sampler, source, plain[words], words, seed, bar)
            order = torch.randperm(len(preserve), generator=generator)
            chosen = order.repeat(-(-config.trajectories // len(order)))[: config.trajectories]
            preserve_points = _buffer(sampler, preserve, chosen, chosen, seed + 10_000, bar)
        parameters = lora.attach(
            unet, models.names, rank=config.rank, alpha=config.lora_alpha, seed=seed
        )
        attached = True
        optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: 1.0 - step / config.steps
        )
        with progress_bars.bar(total=config.steps, desc="alignment", progress=progress) as bar:
            for step in range(config.steps):
                noise_seed = philox.fold_seed(seed, step)
                z_m, t_m, index = target_points.draw(config.batch_size, generator)
                # Any prompt of the word that the trajectory was drawn for.
                within = torch.rand(len(index), generator=generator).to(index.device)
                index = starts[index] + (within * counts[index]).long()
                student_m, anchor_m, source_m = source[index], anchor[index], source[index]
                if mining_config.mode in ("gaussian", "covariance", "offset"):
                    student_m = mining.sample(
                        source_m, mining_config.neighbor_region, samples=1, seed=noise_seed
                    ).rows()[:, 0]
                half = max(1, config.batch_size // 2)
                beyond = mining.sample(
                    source_m[:half],
                    mining_config.beyond_region,
                    samples=1,
                    seed=philox.fold_seed(noise_seed, 1),
                ).rows()[:, 0]
                z_p, t_p, index = preserve_points.draw(config.batch_size, generator)
                kept = preserve[index]
                latents = torch.cat([z_m, z_m[:half], z_p])
                timesteps = torch.cat([t_m, t_m[:half], t_p])
                with torch.no_grad(), lora.disabled(unet):
                    states = [anchor_m, beyond, kept]
                    if config.negative_guidance:
                        teacher = sampler.predict(
                            torch.cat([latents, z_m]),
                            torch.cat([timesteps, t_m]),
                            torch.cat([*states, source_m]),
                        )
                        teacher, original = teacher[: len(latents)], teacher[len(latents) :]
                        teacher[: len(z_m)] -= config.negative_guidance * (
                            original - teacher[: len(z_m)]
                        )
                    else:
                        teacher = sampler.predict(latents, timesteps, torch.cat(states))
                with models.edited():
                    student = sampler.predict(
                        latents, timesteps, torch.cat([student_m, beyond, kept])
                    )
                    sizes = [len(z_m), half, len(z_p)]
                    terms = [
                        functional.mse_loss(s, t)
                        for s, t in zip(student.split(sizes), teacher.split(sizes), strict=True)
                    ]
                    loss = (
                        terms[0] + config.beyond_scale * terms[1] + config.preserve_scale * terms[2]
                    )
                    if not torch.isfinite(loss):
                        raise FloatingPointError(f"alignment loss is {loss.item()} at step {step}")
                    optimizer.zero_grad(set_to_none=True)
                    # Half precision holds no gradient below 6e-8: it travels scaled.
                    (loss * scale).backward()
                for parameter in parameters:
                    if parameter.grad is not None:
                        parameter.grad.div_(scale)
                norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                if not torch.isfinite(norm):
                    raise FloatingPointError(f"gradient norm is {norm.item()} at step {step}")
                optimizer.step()
                schedule.step()
                losses.append(loss.item())
                bar.set_postfix(loss=f"{losses[-1]:.4f}")
                bar.update(1)
        factors = lora.extract(unet)
        before = after = None
        if config.check_seeds:
            before, after = _check(models, sampler, named, preserve, seed + 20_000, progress)
    except FloatingPointError as error:
        logger.warning("alignment diverged and the closed form stays alone: %s", error)
        factors, before, after = {}, None, None
    finally:
        if attached:
            lora.detach(unet)
        for module, flag in training.items():
            module.training = flag
    kept_adapters = bool(factors)
    if before is not None and after is not None:
        kept_adapters = after.target < before.target and after.preserve <= before.preserve
        if not kept_adapters:
            logger.info("alignment did not improve the held-back pictures: closed form alone")
    return Alignment(
        factors if kept_adapters else {},
        kept_adapters,
        before,
        after,
        tuple(losses),
        time.perf_counter() - started,
    )


def _check(
    models: _Models,
    sampler: _Sampler,
    named: Sequence[AlignedPrompts],
    preserve: Tensor,
    seed: int,
    progress: bool | None,
) -> tuple[AlignmentScore, AlignmentScore]:
    """Scores of the closed form alone and with the adapters, on seeds that training never saw."""
    device, config = sampler.device, sampler.config
    source = torch.stack([m.source[m.plain] for m in named]).to(device)
    anchor = torch.stack([m.anchor[m.plain] for m in named]).to(device)
    count = max(4, len(source))
    kept = preserve[torch.linspace(0, len(preserve) - 1, min(count, len(preserve))).long()]

    def repeat(states: Tensor) -> Tensor:
        return states.repeat_interleave(config.check_seeds, dim=0)

    groups = [repeat(source), repeat(anchor), repeat(kept)]
    sizes = [len(group) for group in groups]
    # The same noise for a word and for its anchor: equal conditioning then gives equal pictures.
    starts = [seed + i for i in range(sizes[0])]
    seeds = [*starts, *starts, *(seed + 5_000 + i for i in range(sizes[2]))]
    total = 3 * config.sampling_steps
    with progress_bars.bar(total=total, desc="alignment check", progress=progress) as bar:

        def draw(states: Sequence[Tensor], chosen: Sequence[int]) -> Tensor:
            return sampler.trajectories(torch.cat(list(states)), chosen, bar)[0][-1]

        with lora.disabled(sampler.unet):
            original, anchored, untouched = draw(groups, seeds).split(sizes)
            with models.edited():
                closed = draw(
                    [groups[0], groups[2]], [*seeds[: sizes[0]], *seeds[-sizes[2] :]]
                ).split([sizes[0], sizes[2]])
        with models.edited():
            aligned = draw([groups[0], groups[2]], [*seeds[: sizes[0]], *seeds[-sizes[2] :]]).split(
                [sizes[0], sizes[2]]
            )
    reach = float((original - anchored).square().mean())
    spread = _spread(untouched)

    def score(pictures: Sequence[Tensor]) -> AlignmentScore:
        return AlignmentScore(
            target=float((pictures[0] - anchored).square().mean()) / max(reach, 1e-12),
            preserve=float((pictures[1] - untouched).square().mean()) / max(spread, 1e-12),
        )

    return score(closed), score(aligned)


def find_scheduler(unet: Any) -> Any:
    """The noise scheduler beside the U-Net's own files, or Stable Diffusion's schedule."""
    from diffusers import DDIMScheduler

    name = str(getattr(unet.config, "_name_or_path", "") or "")
    if name:
        local = Path(name).exists()
        place = str(Path(name).parent) if local else name
        try:
            return DDIMScheduler.from_pretrained(
                place, subfolder="scheduler", local_files_only=True
            )
        except (OSError, ValueError) as error:
            logger.debug("no scheduler beside %s: %s", name, error)
    logger.warning(
        "scheduler: none was found beside the U-Net; Stable Diffusion's schedule is assumed "
        "(scaled linear, 1000 steps, noise prediction): pass scheduler=pipe.scheduler"
    )
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
