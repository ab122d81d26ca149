"""Erasing from Stable Diffusion 1.4 at full size: seconds and peak memory by stage.

The architecture is that of CompVis/stable-diffusion-v1-4 (U-Net, CLIP ViT-L/14 text encoder); the
weights are random, so that nothing has to be downloaded: time and memory don't depend on them. The
tokenizer is the embedded model's. What erasing does is measured elsewhere.
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
from typing import Any

import psutil
import torch
from diffusers import UNet2DConditionModel
from harness.provenance import provenance
from harness.rows import file_for, measured
from transformers import CLIPTextConfig, CLIPTextModel

from realera_fast import EraseConfig, embedded, erase
from realera_fast.text import VocabularyConfig


@dataclasses.dataclass(frozen=True)
class Point:
    """One erasure."""

    concepts: int
    words: int
    """Of the preserve prior."""
    dtype: str

    @property
    def title(self) -> str:
        return f"{self.concepts} concepts, {self.words} words, {self.dtype}"


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
            self.unet: Any = UNet2DConditionModel(cross_attention_dim=768).eval()
            self.encoder = CLIPTextModel(
                CLIPTextConfig(
                    vocab_size=49408,
                    hidden_size=768,
                    intermediate_size=3072,
                    num_hidden_layers=12,
                    num_attention_heads=12,
                )
            ).eval()
        self.tokenizer = embedded.load_pipeline().tokenizer
        self.tokenizer.model_max_length = 77
        self.memory = Memory(device)

    def measure(self, point: Point) -> list[dict[str, Any]]:
        dtype = getattr(torch, point.dtype)
        unet, encoder = self.unet.to(dtype), self.encoder.to(dtype)
        config = EraseConfig(
            vocabulary=VocabularyConfig(words=point.words, cache=False),
            alignment=dataclasses.replace(EraseConfig().alignment, enabled=False),
        )
        names = [
            f"{a} {b}"
            for a in self.tokenizer.get_vocab()
            for b in ("of", "in")
            if a.endswith("</w>") and a[:-4].isalpha()
        ]
        concepts = [f"{n.replace('</w>', '')}=photo" for n in names if "photo" not in n]
        self.memory.peak()
        with stages(self.memory) as heard:
            started = time.perf_counter()
            erasure = erase(
                unet,
                encoder,
                concepts[: point.concepts],
                tokenizer=self.tokenizer,
                config=config,
                progress=False,
            )
            whole = time.perf_counter() - started
        last = self.memory.peak()
        seconds: Mapping[str, float] = erasure.report["seconds"]
        rows = [self._row(point, name, seconds[name], heard.peaks[name]) for name in seconds]
        rows.append(self._row(point, "edit and checks", whole - sum(seconds.values()), last))
        rows.append(self._row(point, "all", whole, max(*heard.peaks.values(), last)))
        with tempfile.TemporaryDirectory() as folder:
            for name, save in (
                ("save", lambda path: erasure.save(path)),
                ("save_lora", lambda path: erasure.save_lora(path, unet)),
                ("save_weights", lambda path: erasure.save_weights(path, unet)),
            ):
                path = Path(folder) / f"{name}.safetensors"
                started = time.perf_counter()
                save(path)
                row = self._row(point, name, time.perf_counter() - started, self.memory.peak())
                rows.append({**row, "file_mb": path.stat().st_size / 2**20})
        started = time.perf_counter()
        erasure.restore_(unet)
        rows.append(self._row(point, "restore_", time.perf_counter() - started, self.memory.peak()))
        return rows

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
        yield f"{row['stage']:>16}: {row['seconds']:8.2f} s, {row['peak_mb']:,} MiB{size}"


def main(arguments: argparse.Namespace) -> int:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        points = [Point(n, 1000, dtype) for dtype in ("float32", "float16") for n in (1, 10, 100)]
    else:
        # A text encoder on a CPU takes its time: fewer words.
        points = [Point(1, 100, "float32"), Point(10, 100, "float32")]
    bench = Bench(device)
    measured(
        points[:1] if arguments.quick else points,
        bench.measure,
        lines,
        provenance(arguments.threads),
        file_for("full_size", arguments.out, quick=arguments.quick),
    )
    bench.memory.stop()
    return 0
