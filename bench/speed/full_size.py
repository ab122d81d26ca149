"""Erasing from Stable Diffusion 1.4 at full size: seconds and peak memory of whole calls.

The architecture is that of CompVis/stable-diffusion-v1-4 (U-Net, CLIP ViT-L/14 text encoder) with
CLIP's tokenizer; the weights are random, so that nothing has to be downloaded: time and memory
hardly depend on them. The library's closed form is called for the first time with a text encoder,
whose words it then reads, and again; beside it stand the baselines' whole scripts with their
authors' settings. What erasing does is measured elsewhere.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import logging
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import psutil
import torch
from baselines import mace, rece, uce
from diffusers import UNet2DConditionModel
from harness.provenance import provenance
from harness.rows import file_for, measured
from harness.tables import DEFAULT
from transformers import CLIPTextConfig, CLIPTextModel

from realera_fast import Concept, EraseConfig, Erasure, embedded, erase

_SECONDS_ON_A_CPU = frozenset(
    (
        (DEFAULT, 1),
        *(("UCE", count) for count in (1, 10, 100)),
        *(("RECE", count) for count in (1, 10, 100)),
    )
)
"""What is measured there; the others take minutes each."""
BASELINES: Mapping[str, ModuleType] = {"UCE": uce, "RECE": rece, "MACE, closed form": mace}


@dataclasses.dataclass(frozen=True)
class Point:
    """One call."""

    method: str
    call: str
    """Of the library the "first" with a text encoder or a "later" one; of a baseline "every" one,
    as these keep nothing."""
    concepts: int
    dtype: str

    @property
    def title(self) -> str:
        return f"{self.method}, {self.call} call, {self.concepts} concepts, {self.dtype}"


class Memory:
    """Peak memory between two calls: of the process, or of the GPU's allocator."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._process = device, psutil.Process()
        self._peak, self._running = 0, True
        self._thread = threading.Thread(target=self._sample, daemon=True)
        if device.type == "cpu":
            self._thread.start()

    def _sample(self) -> None:
        while self._running:
            self._peak = max(self._peak, self._process.memory_info().rss)
            time.sleep(0.01)

    def peak(self) -> float:
        """MiB since the last call."""
        if self._device.type == "cuda":
            found = torch.cuda.max_memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        else:
            found, self._peak = max(self._peak, self._process.memory_info().rss), 0
        return found / 2**20

    def stop(self) -> None:
        self._running = False


class _Stages(logging.Handler):
    """Notes the peak memory at the end of each stage, which the library logs."""

    def __init__(self, memory: Memory) -> None:
        super().__init__()
        self.memory = memory
        self.peaks: dict[str, float] = {}

    def emit(self, record: logging.LogRecord) -> None:
        if record.msg == "%s: %.2f s" and isinstance(record.args, tuple):
            name = str(record.args[0])
            self.peaks[name] = max(self.peaks.get(name, 0.0), self.memory.peak())


@contextlib.contextmanager
def stages(memory: Memory) -> Iterator[_Stages]:
    """Listens to the stages of an erasure inside the block."""
    logger, handler = logging.getLogger("realera_fast"), _Stages(memory)
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    logger.propagate = False
    try:
        yield handler
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = True


class Bench:
    """The model, built once."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        torch.manual_seed(0)
        with torch.device(device):
            unet: Any = UNet2DConditionModel(cross_attention_dim=768).eval()
            encoder = CLIPTextModel(
                CLIPTextConfig(
                    vocab_size=49408,
                    hidden_size=768,
                    intermediate_size=3072,
                    num_hidden_layers=12,
                    num_attention_heads=12,
                )
            ).eval()
        tokenizer = embedded.load_pipeline().tokenizer
        tokenizer.model_max_length = 77
        self.pipe = SimpleNamespace(unet=unet, text_encoder=encoder, tokenizer=tokenizer)
        self.names = [thing.name for thing in embedded.words().things]
        self.memory = Memory(device)

    def measure(self, point: Point) -> list[dict[str, Any]]:
        dtype = getattr(torch, point.dtype)
        self.pipe.unet, self.pipe.text_encoder = (
            part.to(dtype) for part in (self.pipe.unet, self.pipe.text_encoder)
        )
        # No call reads the words of another one's concepts.
        names = self.names[:1] if point.call == "first" else self.names[1:][: point.concepts]
        concepts = [Concept(name) for name in names]
        self.memory.peak()
        if point.method in BASELINES:
            return [self._of_baseline(point, concepts)]
        return self._of_library(point, concepts)

    def _of_baseline(self, point: Point, concepts: list[Concept]) -> dict[str, Any]:
        module = BASELINES[point.method]
        weights = {k: v.clone() for k, v in self.pipe.unet.state_dict().items() if ".attn2." in k}
        started = time.perf_counter()
        module.erase(self.pipe, concepts, module.Settings())
        row = self._row(point, "all", time.perf_counter() - started, self.memory.peak())
        self.pipe.unet.load_state_dict(weights, strict=False)
        return row

    def _of_library(self, point: Point, concepts: list[Concept]) -> list[dict[str, Any]]:
        with stages(self.memory) as heard:
            started = time.perf_counter()
            erasure = erase(
                self.pipe.unet,
                self.pipe.text_encoder,
                concepts,
                tokenizer=self.pipe.tokenizer,
                config=EraseConfig.fast(),
                progress=False,
            )
            whole = time.perf_counter() - started
        last = self.memory.peak()
        seconds: Mapping[str, float] = erasure.report["seconds"]
        rows = [self._row(point, name, seconds[name], heard.peaks[name]) for name in seconds]
        rows.append(self._row(point, "edit and checks", whole - sum(seconds.values()), last))
        mined = sum(len(words) for words in erasure.report["neighbors"].values())
        every = self._row(point, "all", whole, max(*heard.peaks.values(), last))
        rows.append(every | {"neighbors": mined})
        rows += self._files(point, erasure)
        started = time.perf_counter()
        erasure.restore_(self.pipe.unet)
        rows.append(self._row(point, "restore_", time.perf_counter() - started, self.memory.peak()))
        return rows

    def _files(self, point: Point, erasure: Erasure) -> Iterator[dict[str, Any]]:
        with tempfile.TemporaryDirectory() as folder:
            for name, save in (
                ("save", lambda path: erasure.save(path)),
                ("save_lora", lambda path: erasure.save_lora(path, self.pipe.unet)),
                ("save_weights", lambda path: erasure.save_weights(path, self.pipe.unet)),
            ):
                path = Path(folder) / f"{name}.safetensors"
                started = time.perf_counter()
                save(path)
                row = self._row(point, name, time.perf_counter() - started, self.memory.peak())
                yield {**row, "file_mb": path.stat().st_size / 2**20}

    def _row(self, point: Point, stage: str, seconds: float, peak: float) -> dict[str, Any]:
        return {
            "model": "SD 1.4",
            **dataclasses.asdict(point),
            "stage": stage,
            "seconds": round(seconds, 4),
            "peak_mb": round(peak),
        }


def lines(rows: list[dict[str, Any]]) -> Iterator[str]:
    """A line for each stage."""
    for row in rows:
        size = f", {row['file_mb']:.1f} MB" if "file_mb" in row else ""
        yield (
            f"{row['method']:>18}, {row['call']:5} {row['concepts']:3} {row['stage']:>16}: "
            f"{row['seconds']:8.2f} s, {row['peak_mb']:,} MiB{size}"
        )


def main(arguments: argparse.Namespace) -> int:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtypes = ("float32", "float16") if device.type == "cuda" else ("float32",)
    points = [
        Point(method, call, concepts, dtype)
        for dtype in dtypes
        for method, call, concepts in (
            (DEFAULT, "first", 1),
            *((DEFAULT, "later", count) for count in (1, 10, 100)),
            *((name, "every", count) for name in BASELINES for count in (1, 10, 100)),
        )
        if device.type == "cuda" or (method, concepts) in _SECONDS_ON_A_CPU
    ]
    with tempfile.TemporaryDirectory() as folder:
        # What an earlier run kept of this text encoder is none of this one's.
        kept = mock.patch("huggingface_hub.cached_assets_path", lambda *parts: _in(folder, *parts))
        with kept:
            bench = Bench(device)
            measured(
                points[:2] if arguments.quick else points,
                bench.measure,
                lines,
                provenance(arguments.threads),
                file_for("full_size", arguments.out, quick=arguments.quick),
                legend="whole calls, one after the other in one process",
            )
    bench.memory.stop()
    return 0


def _in(folder: str, *parts: str) -> Path:
    """Where the library keeps what it read of a text encoder, in another folder."""
    path = Path(folder, *parts)
    path.mkdir(parents=True, exist_ok=True)
    return path
