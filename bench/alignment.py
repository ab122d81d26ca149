"""Noise alignment beside a plain diffusers and peft training loop, and pictures with `fuse`.

Operations, all from the same draws and with the same loss terms:

    step    one optimizer step, z_t and the library's cached teacher given
    train   the whole training divided by its steps: trajectories, teacher, steps
    image   one picture of 20 guided steps, without the VAE: fused and as it was

Candidates:

    library            `realera_fast`
    library compiled   the same with `AlignmentConfig(compile=True)`
    plain              two U-Nets, peft adapters, teacher and student in every step, z_t from the
                       same replay of trajectories
    plain compiled     the same, both U-Nets through torch.compile
    plain, new z_t     the same without replay: every step denoises its z_t, half a picture

Compiling is not part of the times; it is in the rows as `compile_s`. A step passes the U-Net once
forward and once back (the library) or once more for the teacher (plain): no more than 3/2 can be
had from that. `flops` are counted by PyTorch on the library's step.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from baselines.peft_alignment import PlainLoop
from closed_form import percentiles, provenance
from rows import measured
from torch import Tensor, nn

from realera_fast import embedded, fuse, unfuse
from realera_fast.concept_map import ConceptMap
from realera_fast.denoiser import projections
from realera_fast.lora import LoraParameters
from realera_fast.mining import Region
from realera_fast.pairs import AlignedPrompts
from realera_fast.precision import fastest_dtype
from realera_fast.processes import Processes
from realera_fast.progress import bar
from realera_fast.text_path import TextPath
from realera_fast.training import AlignmentConfig, Trainer, loss_of
from realera_fast.trajectories import Denoiser, Points, Window, WindowFiller

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results" / "alignment.jsonl"
QUICK = ROOT / "out" / "alignment.jsonl"

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


def cpu_points(quick: bool) -> list[Point]:
    dtypes = list(dict.fromkeys((torch.float32, fastest_dtype("cpu"))))
    points = [Point("step", "embedded", dtype, compiled=not quick) for dtype in dtypes]
    points += [] if quick else [Point("train", "embedded", dtype) for dtype in dtypes]
    return [*points, *(Point("image", "embedded", dtype) for dtype in dtypes)]


def gpu_points(quick: bool) -> list[Point]:
    half = torch.bfloat16
    return [
        Point("step", "SD 1.4", half, 6, compiled=not quick),
        *([] if quick else [Point("train", "SD 1.4", half, 6)]),
        Point("image", "SD 1.4", half),
        Point("step", "embedded", half, compiled=not quick),
    ]


def model_of(name: str) -> nn.Module:
    """The U-Net; Stable Diffusion's has random weights."""
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
        self.unet: Any = model_of(point.model).to(device, point.dtype).eval()
        self.width = next(iter(projections(self.unet).values())).in_features
        generator = torch.Generator().manual_seed(0)
        channels, size = self.unet.config.in_channels, self.unet.config.sample_size

        def normal(*sizes: int) -> Tensor:
            return torch.randn(sizes, generator=generator).to(device)

        self.config = AlignmentConfig(
            batch_size=point.batch_size, steps=STEPS, trajectories=TRAJECTORIES
        )
        config = self.config
        self.sizes = (config.batch_size, config.beyond_size, config.preserve_size)
        self.scales = (1.0, config.beyond_scale, config.preserve_scale)
        self.rows = sum(self.sizes)
        left = 0.1 * normal(self.width, 8) / self.width**0.5
        self.map = ConceptMap(left.cpu(), normal(8, self.width).cpu())
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
        unet = copy.deepcopy(self.unet).requires_grad_(False)
        lora = LoraParameters(
            projections(unet),
            {},
            r=self.config.r,
            lora_alpha=self.config.lora_alpha,
            seed=0,
            device=self.device,
        )
        path = TextPath(unet, self.map, lora, compiled=compiled)
        return Trainer(path, self.config, None, seed=0, processes=Processes())

    def loop(self, compiled: bool = False) -> PlainLoop:
        return PlainLoop(
            copy.deepcopy(self.unet),
            self.map,
            r=self.config.r,
            lora_alpha=self.config.lora_alpha,
            learning_rate=self.config.learning_rate,
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
                )
            )
            start += size
        return Window(*groups)

    # One run of each candidate

    def library_step(self, compiled: bool = False) -> Callable[[], Any]:
        trainer, window = self.trainer(compiled), self.window()

        def run() -> None:
            with trainer.path.installed():
                trainer.step(window, len(trainer.losses) % STEPS)

        return run

    def plain_step(self, compiled: bool = False) -> Callable[[], Any]:
        loop = self.loop(compiled)
        rows = (self.latents, self.timesteps, self.student, self.teacher)
        return lambda: loop.step(*rows, sizes=self.sizes, scales=self.scales)

    def library_train(self) -> Callable[[], Any]:
        trainer, config = self.trainer(), self.config
        denoiser = Denoiser(
            trainer.path,
            self.scheduler,
            self.empty,
            steps=config.sampling_steps,
            guidance_scale=config.guidance_scale,
            latent_size=None,
            batch_size=config.sampling_batch_size,
        )
        filler = WindowFiller(
            denoiser,
            self.words,
            self.preserve,
            trajectories=TRAJECTORIES,
            min_timestep=0.0,
            negative_guidance=0.0,
            beyond_region=BEYOND,
            latents={},
            seed=0,
            processes=Processes(),
        )

        def run() -> None:
            with trainer.path.installed(), bar(total=1, desc="", progress=False) as progress:
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
        unet = copy.deepcopy(self.unet)
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
        rows = (self.latents, self.timesteps, self.student, self.teacher)
        plain = loop.loss(*rows, sizes=self.sizes, scales=self.scales).item()
        with trainer.path.installed(), torch.no_grad():
            teacher = trainer.path.predict(
                self.latents, self.timesteps, trainer.path.condition(self.teacher, "original")
            )
        window, start = self.window(), 0
        for points in (window.target, window.beyond, window.preserve):
            assert points is not None
            points.teacher.copy_(teacher[start : start + len(points)])
            start += len(points)
        # Every point once: the mean over all rows is the plain loop's.
        loss = 0.0
        with trainer.path.installed(), torch.no_grad():
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
                loss += float(loss_of(trainer.path, batch)[0])
        return abs(loss - plain) / abs(plain)

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


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Flops a second of a large product, the best of some."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(8):
        best = min(best, once(lambda: a @ b, device))
    return 2 * size**3 / best


def once(run: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one run."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def profile(point: Point, device: torch.device) -> str:
    """The slowest operators of the library's and the plain step, as tables."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    kinds = [ProfilerActivity.CPU]
    key = "self_cpu_time_total"
    if device.type == "cuda":
        kinds.append(ProfilerActivity.CUDA)
        key = "self_cuda_time_total"
    problem = Problem(point, device)
    tables = []
    for name, run in (("library", problem.library_step()), ("plain", problem.plain_step())):
        once(run, device)
        with record(activities=kinds) as recorded:
            once(run, device)
        table = recorded.key_averages().table(sort_by=key, row_limit=25)
        tables.append(f"{point.title}, {name}\n{table}\n")
    return "\n".join(tables)


def measure(point: Point, device: torch.device, least: int, seconds: float) -> list[dict[str, Any]]:
    """Rows of all candidates, measured in turns."""
    problem = Problem(point, device)
    runs = problem.candidates()
    error, flops = problem.error(), problem.flops()
    rate = matmul_rate(device, point.dtype) if point.operation == "step" else None
    first = {name: once(run, device) for name, run in runs.items()}
    taken: dict[str, list[float]] = {name: [] for name in runs}
    peak: dict[str, int] = {}
    started = time.perf_counter()
    while len(taken["library"]) < least or time.perf_counter() - started < seconds:
        for name, run in runs.items():
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            taken[name].append(once(run, device))
            if device.type == "cuda":
                peak[name] = torch.cuda.max_memory_allocated()
        if len(taken["library"]) == 50:
            break
    found = []
    for name, times in taken.items():
        steps = STEPS if point.operation == "train" and "new" not in name else 1
        p20, p50, p80 = (1e3 * t / steps for t in percentiles(times))
        compiled = "compiled" in name
        found.append(
            {
                "case": "alignment",
                "operation": point.operation,
                "model": point.model,
                "dtype": str(point.dtype).removeprefix("torch."),
                "rows": problem.rows,
                "candidate": name,
                "repetitions": len(times),
                "p20_ms": p20,
                "p50_ms": p50,
                "p80_ms": p80,
                "compile_s": first[name] - p50 / 1e3 if compiled else None,
                "error": error if name == "library" else None,
                "peak_bytes": peak.get(name),
                "flops": flops,
                "matmul_flops_per_s": rate,
            }
        )
    return found


Key = tuple[str, str, str, int]


def by_point(rows: Sequence[Mapping[str, Any]]) -> dict[Key, dict[str, Mapping[str, Any]]]:
    """Rows by operation, model, dtype and number of rows; then by candidate."""
    points: dict[Key, dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        key = tuple(row[name] for name in ("operation", "model", "dtype", "rows"))
        points.setdefault(key, {})[row["candidate"]] = row  # type: ignore[arg-type]
    return points


def title(key: Key) -> str:
    operation, model, dtype, _ = key
    return f"{operation} {model} {dtype}"


def times(point: Mapping[str, Mapping[str, Any]], name: str) -> float | None:
    """How many times as long as the library a candidate takes."""
    return point[name]["p50_ms"] / point["library"]["p50_ms"] if name in point else None


def missed(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Every target that the rows don't meet."""
    found: list[str] = []
    for key, point in by_point(rows).items():
        own, plain = point["library"], times(point, "plain")
        assert plain is not None
        cuda = own["peak_bytes"] is not None
        if key[0] == "image":
            if own["error"] > 0:
                found.append(f"{title(key)}: differs by {own['error']:.1g}, wanted 0")
            continue
        wanted = 2.0 if cuda else 1.5
        if plain < wanted:
            found.append(f"{title(key)}: {plain:.2f}x the plain loop, wanted {wanted}")
        if cuda and key[0] == "step" and key[1] != "embedded":
            share = own["flops"] / (own["p50_ms"] / 1e3) / own["matmul_flops_per_s"]
            if share < 0.45:
                found.append(f"{title(key)}: {share:.0%} of the matrix peak, wanted 45%")
            memory = own["peak_bytes"] / point["plain"]["peak_bytes"]
            if memory > 0.6:
                found.append(f"{title(key)}: {memory:.0%} of the memory, wanted 60%")
    return found


def line(key: Key, point: Mapping[str, Mapping[str, Any]]) -> str:
    cells = [f"{title(key):26}", f"{point['library']['p50_ms']:10.1f} ms"]
    for name in point:
        if name != "library":
            cells.append(f"{name} {times(point, name):.2f}x")
    error = point["library"]["error"]
    return "  ".join(cells) + ("" if error is None else f"  error {error:.1g}")


def main(arguments: argparse.Namespace) -> int:
    if arguments.plot:
        import plots

        plots.alignment()
        return 0
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if arguments.profile:
        points = (gpu_points if device.type == "cuda" else cpu_points)(True)
        arguments.profile.parent.mkdir(parents=True, exist_ok=True)
        arguments.profile.write_text(profile(points[0], device), encoding="utf-8")
        return 0
    points = (gpu_points if device.type == "cuda" else cpu_points)(arguments.quick)
    effort = (3, 1.0) if arguments.quick else (5, 10.0)
    out = arguments.out or (QUICK if arguments.quick else RESULTS)
    rows = measured(
        points,
        lambda point: measure(point, device, *effort),
        lambda found: (line(key, point) for key, point in by_point(found).items()),
        provenance(device, arguments.threads),
        out,
    )
    failures = missed(rows)
    print("targets missed: " + "; ".join(failures) if failures else "targets met")
    return 0
