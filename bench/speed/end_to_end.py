"""Whole erasures with both stages: seconds and peak memory, stage by stage.

On a GPU from models of the architecture of Stable Diffusion 1.4 and SDXL with random weights, in
bfloat16, which time and memory hardly depend on; on a CPU from the embedded model. The first call
with a model reads its words; a later one has them. Every stage runs as it is by default. What
erasing does is measured elsewhere.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from harness.provenance import provenance
from harness.rows import file_for, measured
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from realera_fast import Concept, EraseConfig, embedded, erase
from speed.full_size import Memory, stages


@dataclass(frozen=True)
class Parts:
    """What is erased from, and what reads its prompts."""

    unet: Any
    text_encoders: list[Any]
    tokenizers: list[Any]
    scheduler: Any


@dataclass(frozen=True)
class Point:
    """One call."""

    model: str
    call: str
    """ "first" with this model, or "later"."""
    concepts: int

    @property
    def title(self) -> str:
        return f"{self.model}, {self.call} call, {self.concepts} concepts"


SDXL: dict[str, Any] = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "use_linear_projection": True,
}
"""Of stabilityai/stable-diffusion-xl-base-1.0, which differs from the class's defaults there."""


def _clip(kind: Any, width: int, layers: int, heads: int) -> Any:
    return kind(
        CLIPTextConfig(
            vocab_size=49408,
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            projection_dim=width,
        )
    )


def stable_diffusion_1() -> tuple[Any, list[Any]]:
    """U-Net and text encoder of CompVis/stable-diffusion-v1-4."""
    unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
    return unet, [_clip(CLIPTextModel, 768, 12, 12)]


def stable_diffusion_xl() -> tuple[Any, list[Any]]:
    """U-Net and text encoders of stabilityai/stable-diffusion-xl-base-1.0."""
    first = _clip(CLIPTextModel, 768, 12, 12)
    return UNet2DConditionModel(**SDXL), [first, _clip(CLIPTextModelWithProjection, 1280, 32, 20)]


def random_parts(build: Callable[[], tuple[Any, list[Any]]], device: torch.device) -> Parts:
    """A model with random weights on a device."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            unet, encoders = build()
    finally:
        torch.set_default_dtype(before)
    tokenizer = embedded.load_pipeline().tokenizer
    tokenizer.model_max_length = 77
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    return Parts(
        unet.eval(), [e.eval() for e in encoders], [tokenizer for _ in encoders], scheduler
    )


def embedded_parts() -> Parts:
    """The model that ships with the library."""
    pipe = embedded.load_pipeline()
    return Parts(pipe.unet, [pipe.text_encoder], [pipe.tokenizer], pipe.scheduler)


def whole(
    point: Point, parts: Parts, names: list[str], memory: Memory, config: EraseConfig
) -> list[dict[str, Any]]:
    """Rows of one call; the model is afterwards as it was."""

    def row(stage: str, seconds: float, peak: float) -> dict[str, Any]:
        return {
            "model": point.model,
            "call": point.call,
            "concepts": point.concepts,
            "dtype": str(parts.unet.dtype).removeprefix("torch."),
            "stage": stage,
            "seconds": round(seconds, 4),
            "peak_mb": round(peak),
        }

    many = len(parts.text_encoders) > 1
    memory.peak()
    with stages(memory) as heard:
        started = time.perf_counter()
        erasure = erase(
            parts.unet,
            tuple(parts.text_encoders) if many else parts.text_encoders[0],
            [Concept(name) for name in names],
            tokenizer=tuple(parts.tokenizers) if many else parts.tokenizers[0],
            scheduler=parts.scheduler,
            config=config,
            progress=False,
        )
        seconds = time.perf_counter() - started
    last = memory.peak()
    named = erasure.report["seconds"]
    rows = [row(stage, named[stage], heard.peaks[stage]) for stage in named]
    rows.append(row("edit and checks", seconds - sum(named.values()), last))
    rows.append(row("all", seconds, max(*heard.peaks.values(), last)))
    erasure.restore_(parts.unet)
    return rows


def lines(rows: list[dict[str, Any]]) -> Iterator[str]:
    """A line for each stage."""
    for row in rows:
        yield (
            f"{row['model']:>8}, {row['call']:5} {row['concepts']:3} {row['stage']:>16}: "
            f"{row['seconds']:8.2f} s, {row['peak_mb']:,} MiB"
        )


def main(arguments: argparse.Namespace) -> int:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    builders: dict[str, Callable[[], Parts]] = {"embedded": embedded_parts}
    if device.type == "cuda":
        builders = {
            "SD 1.4": lambda: random_parts(stable_diffusion_1, device),
            "SDXL": lambda: random_parts(stable_diffusion_xl, device),
        }
    calls = (("first", 1),) if arguments.quick else (("first", 1), ("later", 1), ("later", 10))
    points = [Point(model, *call) for model in builders for call in calls]
    names = [thing.name for thing in embedded.words().things]
    built: dict[str, Parts] = {}
    memory = Memory(device)

    def measure(point: Point) -> list[dict[str, Any]]:
        if point.model not in built:
            # One model at a time.
            built.clear()
            built[point.model] = builders[point.model]()
        start = 0 if point.call == "first" else point.concepts
        chosen = names[start : start + point.concepts]
        return whole(point, built[point.model], chosen, memory, EraseConfig())

    with tempfile.TemporaryDirectory() as folder:
        # What an earlier run kept of a text encoder is none of this one's.
        kept = mock.patch(
            "huggingface_hub.cached_assets_path", lambda *parts: _in(folder, *map(str, parts))
        )
        with kept:
            measured(
                points,
                measure,
                lines,
                provenance(arguments.threads),
                file_for("end_to_end", arguments.out, quick=arguments.quick),
                legend="whole calls, one after the other in one process",
            )
    memory.stop()
    return 0


def _in(folder: str, *parts: str) -> Path:
    """Where the library keeps what it read of a text encoder, in another folder."""
    path = Path(folder, *parts)
    path.mkdir(parents=True, exist_ok=True)
    return path
