"""Whole erasures with both stages: seconds and peak memory, stage by stage.

On a GPU from models of the architecture of Stable Diffusion 1.4 and SDXL with random weights, in
bfloat16, which time and memory hardly depend on; on a CPU from the embedded model. The first call
with a model reads its words; a later one has them. Every stage runs as it is by default. What
erasing does is measured elsewhere.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from harness.provenance import provenance
from harness.rows import file_for, measured

from realera_fast import Concept, EraseConfig, embedded, erase
from speed.full_size import Memory, nothing_kept, stages
from speed.models import Parts, embedded_parts, random_parts


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

    memory.peak()
    with stages(memory) as heard:
        started = time.perf_counter()
        erasure = erase(
            parts.unet,
            parts.text_encoder,
            [Concept(name) for name in names],
            tokenizer=parts.tokenizer,
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
            model: partial(random_parts, model, device, torch.bfloat16)
            for model in ("SD 1.4", "SDXL")
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

    with nothing_kept():
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
