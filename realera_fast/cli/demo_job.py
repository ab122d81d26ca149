"""The main job on the embedded model: erase one object and one style, and show what happened.

`run_demo` draws a fixed list of prompts before and after the erasure from the same seeds, lets the
embedded judge say what it sees, and writes ``before_after.png``, ``report.html``, ``report.json``
and ``erasure.safetensors``. The words that measure generality are held out: the eraser never gets
one of them by name, which is checked here.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from realera_fast.cli.demo_plan import ERASE_CONFIG, DemoConfig, check_held_out, plan
from realera_fast.cli.demo_report import DemoResult, Evidence, write_images, write_report
from realera_fast.config import EraseConfig
from realera_fast.eraser import erase
from realera_fast.evaluation import Judge, Sampling, Shot, generate, judged, sampling_settings
from realera_fast.runtime import Clock, progress_bar, write_atomically
from realera_fast.text import Concept
from realera_fast.unet import fuse

_LOADING, _ERASING = 2, 12
"""Batches of images that take as long as the loading and as the erasing (measured, one thread)."""


def run_demo(
    out: str | Path,
    config: DemoConfig | None = None,
    *,
    erase_config: EraseConfig | None = None,
    device: str | torch.device | None = None,
    progress: bool | None = None,
    pipe: Any = None,
    judge: Judge | None = None,
    table: Any = None,
) -> DemoResult:
    """Erases one object and one style from the embedded model and reports what happened.

    Args:
        out: folder for the results; made if it is not there. Its `FILES` are replaced.
        config: what to erase and how many images to sample.
        erase_config: settings of the eraser; None takes `ERASE_CONFIG`, with both stages.
        device: where to run; None takes the first GPU, or the CPU.
        progress: draw progress bars; None follows diffusers' switch.
        pipe: a pipeline in place of the embedded one.
        judge: a judge in place of the embedded one.
        table: words in place of the embedded ones.

    Returns:
        Scores before and after; everything else is in the files.

    Raises:
        ValueError: the embedded model does not know the thing or the style.
        OSError: the folder can't be written.
    """
    from realera_fast import embedded

    config = config or DemoConfig()
    table = embedded.words() if table is None else table
    shots = plan(table, config)
    concepts = (
        Concept(config.thing),
        Concept(config.style, anchor=config.style_anchor, kind="style"),
    )
    held_out = check_held_out(concepts, table)
    folder = _writable(Path(out))
    sampling = _sampling_of(config, table)
    clock = Clock(digits=2)
    with _job_bar(len(shots), sampling, progress) as job:
        pipe, judge = _loaded(pipe, judge, device)
        job.update(_LOADING)
        clock.lap("load")
        settings = _settings(pipe, sampling, config, len(shots))
        before = _sample(pipe, shots, sampling, job, "before")
        clock.lap("pictures before")
        job.set_description("demo: erasing")
        erasure = erase(
            pipe.unet,
            pipe.text_encoder,
            concepts,
            tokenizer=pipe.tokenizer,
            scheduler=pipe.scheduler,
            config=erase_config or ERASE_CONFIG,
            progress=progress,
        )
        job.update(_ERASING)
        clock.lap("erasing")
        after = _sample(pipe, shots, sampling, job, "after")
        clock.lap("pictures after")
    seen_before, seen_after = judged(judge, shots, before), judged(judge, shots, after)
    clock.lap("judging")
    evidence = Evidence(
        config=config,
        table=table,
        shots=shots,
        before=tuple(before),
        after=tuple(after),
        seen_before=tuple(seen_before),
        seen_after=tuple(seen_after),
        concepts=concepts,
        held_out=tuple(held_out),
        erasure=erasure,
        settings=settings,
    )
    write_images(evidence, folder)
    clock.lap("writing")
    return write_report(evidence, folder, clock.seconds)


def _writable(folder: Path) -> Path:
    """The folder, made; an unwritable one shows now, not after minutes of work."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "report.json", b"{}\n")
    return folder


def _sampling_of(config: DemoConfig, table: Any) -> Sampling:
    """Guidance and size as the embedded model was made for, steps and batches as configured."""
    return Sampling(
        steps=config.steps,
        guidance=table.sampling["guidance_scale"],
        height=table.sampling.get("height"),
        width=table.sampling.get("width"),
        batch_size=config.batch_size,
    )


def _job_bar(shots: int, sampling: Sampling, progress: bool | None) -> Any:
    """The progress bar of the whole job, in batches of images."""
    batches = -(-shots // sampling.batch_size)
    return progress_bar(
        total=_LOADING + 2 * batches + _ERASING,
        desc="demo: loading",
        progress=progress,
        unit="batch",
        smoothing=0,
    )


def _loaded(pipe: Any, judge: Judge | None, device: str | torch.device | None) -> tuple[Any, Judge]:
    """The pipeline, on the device, and the judge: the given ones, or the embedded ones."""
    from realera_fast import embedded

    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if pipe is None:
        # A tenth less time on a CPU: keys and values once per image instead of once per step,
        # and the memory layout that convolutions are fast in.
        pipe = fuse(embedded.load_pipeline())
        pipe.unet.to(memory_format=torch.channels_last)
    return pipe.to(device), embedded.load_judge() if judge is None else judge


def _settings(pipe: Any, sampling: Sampling, config: DemoConfig, shots: int) -> dict[str, Any]:
    """What it takes to sample the same images again."""
    with _quick_sampler(pipe):
        settings = sampling_settings(pipe, sampling)
    return settings | {
        "first_seed": config.seed,
        "pictures": 2 * shots,
        "machine": platform.machine(),
        "torch_threads": torch.get_num_threads(),
    }


def _sample(
    pipe: Any, shots: Sequence[Shot], sampling: Sampling, job: Any, when: str
) -> list[Image.Image]:
    """Image i of shot i, batch by batch: `job` moves with each."""
    job.set_description(f"demo: drawing {len(shots)} images {when}")
    images: list[Image.Image] = []
    with _quick_sampler(pipe):
        # All shots in one list: batches stay full.
        for start in range(0, len(shots), sampling.batch_size):
            batch = shots[start : start + sampling.batch_size]
            prompts, seeds = [shot.prompt for shot in batch], [shot.seed for shot in batch]
            images += generate(pipe, prompts, seeds, sampling, progress=False)
            job.update(1)
    return images


@contextmanager
def _quick_sampler(pipe: Any) -> Iterator[None]:
    """Draws with DPM-Solver++ on the pipeline's own noise schedule inside."""
    from diffusers import DPMSolverMultistepScheduler

    own = pipe.scheduler
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(
        own.config, timestep_spacing="trailing"
    )
    try:
        yield
    finally:
        pipe.scheduler = own
