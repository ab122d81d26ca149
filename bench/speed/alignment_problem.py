"""One training step, a training, and a picture: by the library and by the plain loop."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from baselines.peft_alignment import PlainLoop
from torch import Tensor, nn

from realera_fast import embedded, fuse, unfuse
from realera_fast.alignment import AlignmentConfig, Points, Trainer, Window, WindowFiller, loss_of
from realera_fast.alignment.adversary import adversary_of
from realera_fast.alignment.denoisers import ClosedForm, new_factors, sampler_of, shared_denoiser
from realera_fast.embedded.flow import load_flow
from realera_fast.mining import MiningConfig, Region
from realera_fast.models import TEXT_STREAM, Stream, is_joint, projections
from realera_fast.runtime import Processes, progress_bar
from realera_fast.solver import ConceptMap
from realera_fast.text import AlignedPrompts

FLOW = "embedded flow"
"""The sibling with joint attention: a step's prompts have the pooled vector as their last row."""
TOKENS = 77
BEYOND = Region(-1.0, 0.5, 1.6)
IMAGE_STEPS = 20
# The default has 8 trajectories for 100 steps.
TRAJECTORIES, STEPS = 2, 25


@dataclass(frozen=True)
class Point:
    """One problem, given to every candidate."""

    operation: str
    model: str
    dtype: torch.dtype
    batch_size: int = 8
    compiled: bool = False

    @property
    def title(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.operation} {self.model} {dtype}"


def model_of(name: str) -> nn.Module:
    """The denoiser; Stable Diffusion's has random weights."""
    if name == FLOW:
        return load_flow().transformer
    if name == "embedded":
        return embedded.load_pipeline().unet
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(sample_size=64, cross_attention_dim=768)


class Problem:
    """A point's models and data."""

    def __init__(self, point: Point, device: torch.device) -> None:
        from diffusers import DDIMScheduler

        self.point, self.device = point, device
        self.model: Any = model_of(point.model).to(device, point.dtype).eval()
        self.is_joint = is_joint(self.model)
        self.width = next(iter(projections(self.model).values())).in_features
        generator = torch.Generator().manual_seed(0)
        channels, size = self.model.config.in_channels, self.model.config.sample_size

        def normal(*sizes: int) -> Tensor:
            return torch.randn(sizes, generator=generator).to(device)

        self.config = AlignmentConfig(
            batch_size=point.batch_size,
            steps=STEPS,
            trajectories=TRAJECTORIES,
            adversary="worst" if point.operation == "worst step" else "none",
        )
        config = self.config
        self.sizes = (config.batch_size, config.beyond_size, config.preserve_size)
        self.scales = (1.0, config.beyond_scale, config.preserve_scale)
        self.rows = sum(self.sizes)
        widths: dict[Stream, int] = {"sequence": self.width}
        if self.is_joint:
            widths["pooled"] = self.model.config.pooled_projection_dim
        self.maps = {
            stream: ConceptMap(0.1 * normal(width, 8).cpu() / width**0.5, normal(8, width).cpu())
            for stream, width in widths.items()
        }
        self.latents = normal(self.rows, channels, size, size)
        self.timesteps = torch.randint(0, 1000, (self.rows,), generator=generator).to(device)
        self.student = normal(self.rows, TOKENS, self.width).to(point.dtype)
        self.teacher = normal(self.rows, TOKENS, self.width).to(point.dtype)
        # What keeps its prediction is shown the same to both.
        self.teacher[self.sizes[0] :] = self.student[self.sizes[0] :]
        self.words = Words(normal(2, 3, TOKENS, self.width))
        self.preserve = normal(4, TOKENS, self.width)
        self.empty = normal(1, TOKENS, self.width)
        self.scheduler = DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        )
        self.scheduler.set_timesteps(config.sampling_steps)

    def trainer(self, compiled: bool = False) -> Trainer:
        model = copy.deepcopy(self.model).requires_grad_(False)
        config = dataclasses.replace(self.config, compile=compiled)
        lora = new_factors(model, config, 0)
        shared = shared_denoiser(model, ClosedForm(self.maps), lora, config)
        adversary = adversary_of(shared, config, MiningConfig())
        return Trainer(shared, config, adversary, seed=0, processes=Processes())

    def loop(self, compiled: bool = False) -> PlainLoop:
        names = self.config.target_modules
        return PlainLoop(
            copy.deepcopy(self.model),
            self.maps,
            r=self.config.r,
            lora_alpha=self.config.lora_alpha,
            learning_rate=self.config.learning_rate,
            target_modules=[TEXT_STREAM[n] if self.is_joint else n for n in names],
            compiled=compiled,
        )

    def window(self) -> Window:
        """The rows of a step, their teacher's predictions made up."""
        groups, start = [], 0
        for size in self.sizes:
            part = slice(start, start + size)
            groups.append(
                Points(
                    self.latents[part],
                    self.timesteps[part],
                    self.student[part].float(),
                    torch.arange(size, device=self.device),
                    0.1 * self.latents[part],
                    0.2 * self.latents[part],
                )
            )
            start += size
        return Window(*groups)

    # One run of each candidate

    def library_step(self, compiled: bool = False) -> Callable[[], Any]:
        trainer, window = self.trainer(compiled), self.window()

        def run() -> None:
            with trainer.shared.installed():
                trainer.step(window, len(trainer.losses) % STEPS)

        return run

    def plain_step(self, compiled: bool = False) -> Callable[[], Any]:
        loop = self.loop(compiled)
        rows = (self.latents, self.timesteps, self.student, self.teacher)
        if self.config.adversary == "none":
            return lambda: loop.step(*rows, sizes=self.sizes, scales=self.scales)
        targets = slice(self.sizes[0])
        shown, distance = 0.2 * self.latents[targets], self.config.adversary_distance

        def run() -> None:
            latents, timesteps, student, teacher = rows
            given = (latents[targets], timesteps[targets], student[targets])
            moved = loop.worst(*given, shown, distance)
            student = torch.cat([moved.to(student), student[targets.stop :]])
            loop.step(latents, timesteps, student, teacher, sizes=self.sizes, scales=self.scales)

        return run

    def library_train(self) -> Callable[[], Any]:
        trainer, config = self.trainer(), self.config
        sampler = sampler_of(
            trainer.shared, self.scheduler, self.empty, config, config.sampling_steps
        )
        filler = WindowFiller(
            sampler,
            self.words,
            self.preserve,
            AlignmentConfig(
                trajectories=TRAJECTORIES,
                preserve_trajectories=TRAJECTORIES,
                negative_guidance=0.0,
            ),
            beyond_region=BEYOND,
            latents={},
            seed=0,
            processes=Processes(),
        )

        def run() -> None:
            with (
                trainer.shared.installed(),
                progress_bar(total=1, desc="", progress=False) as progress,
            ):
                window = filler.fill(0, "aligned", progress)
                for number in range(STEPS):
                    trainer.step(window, number)

        return run

    def plain_train(self) -> Callable[[], Any]:
        loop, config = self.loop(), self.config
        shape = (TRAJECTORIES, *self.latents.shape[1:])
        empty = self.empty.expand(TRAJECTORIES, -1, -1)

        def run() -> None:
            for states in (self.words.sources, self.preserve[:TRAJECTORIES]):
                noise = torch.randn(shape, device=self.device)
                loop.trajectory(self.scheduler, noise, states, empty, config.guidance_scale)
            # Any z_t costs the same: the drawing alone is left out.
            for _ in range(STEPS):
                rows = (self.latents, self.timesteps, self.student, self.teacher)
                loop.step(*rows, sizes=self.sizes, scales=self.scales)

        return run

    def plain_new(self) -> Callable[[], Any]:
        """One step whose z_t is denoised for it, half a picture on average."""
        loop, config = self.loop(), self.config
        count = self.sizes[0] + self.sizes[2]
        half = copy.deepcopy(self.scheduler)
        half.timesteps = half.timesteps[: len(half.timesteps) // 2]
        states = torch.cat([self.student[: self.sizes[0]], self.student[-self.sizes[2] :]])

        def run() -> None:
            noise = torch.randn((count, *self.latents.shape[1:]), device=self.device)
            empty = self.empty.expand(count, -1, -1)
            loop.trajectory(half, noise, states.float(), empty, config.guidance_scale)
            rows = (self.latents, self.timesteps, self.student, self.teacher)
            loop.step(*rows, sizes=self.sizes, scales=self.scales)

        return run

    def image(self, fused: bool) -> Callable[[], Any]:
        unet = copy.deepcopy(self.model)
        unet = fuse(unet) if fused else unfuse(unet)
        states = torch.cat([self.empty, self.preserve[:1]]).to(self.point.dtype)
        scheduler = copy.deepcopy(self.scheduler)
        scheduler.set_timesteps(IMAGE_STEPS)

        @torch.no_grad()
        def run() -> Tensor:
            latents = self.latents[:1]
            for timestep in scheduler.timesteps:
                both = torch.cat([latents, latents]).to(self.point.dtype)
                free, guided = unet(both, timestep, states).sample.float().chunk(2)
                noise = free + 7.5 * (guided - free)
                latents = scheduler.step(noise, timestep, latents).prev_sample
            return latents

        return run

    def candidates(self) -> dict[str, Callable[[], Any]]:
        if self.point.operation == "image":
            return {"library": self.image(True), "plain": self.image(False)}
        if self.point.operation == "train":
            return {
                "library": self.library_train(),
                "plain": self.plain_train(),
                "plain, new z_t": self.plain_new(),
            }
        found = {"library": self.library_step(), "plain": self.plain_step()}
        if self.point.compiled:
            found["library compiled"] = self.library_step(compiled=True)
            found["plain compiled"] = self.plain_step(compiled=True)
        return found

    # Beside the times

    def error(self) -> float | None:
        """Of the library's result against the plain one, relative to it."""
        if self.point.operation == "image":
            one, other = self.image(True)(), self.image(False)()
            return float((one - other).abs().max() / other.abs().max())
        if self.point.operation == "train":
            return None
        trainer, loop = self.trainer(), self.loop()
        if self.point.operation == "worst step":
            targets = slice(self.sizes[0])
            given = (self.latents[targets], self.timesteps[targets], self.student[targets])
            shown = 0.2 * self.latents[targets]
            plain = loop.gradient(*given, shown).float()
            with trainer.shared.installed():
                own = trainer.shared.error_gradient(*given, shown, "aligned")[1]
            return float((own - plain).norm() / plain.norm())
        rows = (self.latents, self.timesteps, self.student, self.teacher)
        loss_of_plain = loop.loss(*rows, sizes=self.sizes, scales=self.scales).item()
        with trainer.shared.installed(), torch.no_grad():
            teacher = trainer.shared.predict(
                self.latents, self.timesteps, trainer.shared.condition(self.teacher, "original")
            )
        window, start = self.window(), 0
        for points in (window.target, window.beyond, window.preserve):
            assert points is not None
            points.teacher.copy_(teacher[start : start + len(points)])
            start += len(points)
        # Every point once: the mean over all rows is the plain loop's.
        loss = 0.0
        with trainer.shared.installed(), torch.no_grad():
            for points, scale in zip(
                (window.target, window.beyond, window.preserve), self.scales, strict=True
            ):
                assert points is not None
                batch = trainer.batch(window, 0, 0, 1)
                taken = points.take(torch.arange(len(points)))
                count = len(points)
                batch = type(batch)(
                    taken.latents,
                    taken.timesteps,
                    taken.states,
                    taken.teacher,
                    torch.full((count,), scale / count, device=self.device),
                    torch.zeros(3, count, device=self.device),
                )
                loss += float(loss_of(trainer.shared, batch)[0])
        return abs(loss - loss_of_plain) / abs(loss_of_plain)

    def flops(self) -> int | None:
        """Of the library's step: products, convolutions, attention."""
        from torch.utils.flop_counter import FlopCounterMode

        if self.point.operation != "step":
            return None
        run = self.library_step()
        with FlopCounterMode(display=False) as counter:
            run()
        return int(counter.get_total_flops())


class Words(Sequence[AlignedPrompts]):
    """Made-up words, all of them named."""

    def __init__(self, states: Tensor) -> None:
        """
        Args:
            states: `[w, p, t, d]` prompts of each word.
        """
        self.named = len(states)
        self.sources = states[:, 0]
        self._states = states

    def __len__(self) -> int:
        return self.named

    def __getitem__(self, number: Any) -> Any:
        states = self._states[number]
        names = ("",) * len(states)
        weight = torch.ones(states.shape[:2], device=states.device)
        anchor = states.flip(0)
        return AlignedPrompts("", names, names, states, anchor, anchor, weight, 0)
