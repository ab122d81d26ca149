"""Closed forms of models at full size: seconds and peak memory of whole calls.

The library is called for the first time with a text encoder, whose words it then reads, and again;
beside it stand the baselines' whole scripts with their authors' settings. On a CPU a count is left
out where those before it say that it would take longer than `LONGEST`, and so is FLUX, whose T5-XXL
takes seconds for a prompt, unless it is asked for. What erasing does is measured elsewhere.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import dataclasses
import logging
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import torch
from baselines import mace, oce, rece, uce
from harness.provenance import provenance
from harness.rows import file_for, measured
from harness.tables import DEFAULT

from realera_fast import Concept, EraseConfig, Erasure, embedded, erase
from realera_fast.models import streams, text_streams
from speed.models import MODELS, Parts, random_parts

LIBRARY = (("first", 1), *(("later", count) for count in (1, 10, 100, 1000)))
"""Calls of the library; a first one of more concepts takes what reading the words adds to one."""
COUNTS = (1, 10, 100, 1000)
LONGEST = 400.0
"""Seconds; no point is begun on a CPU that is expected to take longer."""
Script = Callable[[Parts, list[Concept]], Any]
"""What a method does with a model."""


def _of_unets(module: Any) -> Script:
    return lambda parts, concepts: module.erase(parts, concepts, module.Settings())


def _uce_entries(parts: Parts, concepts: list[Concept]) -> None:
    texts = text_streams(parts.denoiser, parts.text_encoder, parts.tokenizer)
    uce.erase_entries(parts.denoiser, texts, concepts, uce.Settings())


OF_UNETS: Mapping[str, Script] = {
    "UCE": _of_unets(uce),
    "OCE": _of_unets(oce),
    "RECE": _of_unets(rece),
    "MACE, closed form": _of_unets(mace),
}
OF_TRANSFORMERS: Mapping[str, Script] = {"UCE": _uce_entries}


@dataclasses.dataclass(frozen=True)
class Point:
    """One call."""

    model: str
    method: str
    call: str
    """Of the library the "first" with a text encoder or a "later" one; of a baseline "every" one,
    as these keep nothing."""
    concepts: int
    dtype: str

    @property
    def title(self) -> str:
        return (
            f"{self.model}, {self.method}, {self.call} call, {self.concepts} concepts, {self.dtype}"
        )


def points(models: Sequence[str], device: torch.device) -> Iterator[Point]:
    """All calls, model by model."""
    for model in models:
        scripts = OF_TRANSFORMERS if model == "FLUX" else OF_UNETS
        # T5-XXL in float32 and what it computes with do not fit in the memory of most machines.
        dtypes = ("bfloat16",) if model == "FLUX" else ("float32",)
        if device.type == "cuda":
            dtypes = ("float32", "float16")
        for dtype in dtypes:
            for call, count in LIBRARY:
                yield Point(model, DEFAULT, call, count, dtype)
            for method in scripts:
                for count in COUNTS:
                    yield Point(model, method, "every", count, dtype)


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


@contextlib.contextmanager
def nothing_kept() -> Iterator[None]:
    """Inside the block the library finds nothing that earlier runs kept of a text encoder."""
    with tempfile.TemporaryDirectory() as folder:

        def place(*parts: Any) -> Path:
            path = Path(folder, *map(str, parts))
            path.mkdir(parents=True, exist_ok=True)
            return path

        with mock.patch("huggingface_hub.cached_assets_path", place):
            yield


def trim() -> None:
    """Gives back what earlier calls freed, so that it does not serve the next one unseen."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


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


def expected(count: int, earlier: Sequence[tuple[int, float]]) -> float:
    """Seconds of a call of so many concepts, on a line through the last two counts; of one count
    alone nobody can tell what of it the concepts took, and more are begun."""
    if not earlier:
        return 0.0
    number, took = earlier[-1]
    before = [call for call in earlier if call[0] < number]
    if not before:
        return took
    fewer, base = before[-1]
    return took + (count - number) * (took - base) / (number - fewer)


class Bench:
    """One model at a time, and how long each method took on it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.names = [thing.name for thing in embedded.words().things]
        words = embedded.load_pipeline().tokenizer.get_vocab()
        known = sorted(words, key=lambda token: words[token])
        plain = (t.removesuffix("</w>") for t in known if t.endswith("</w>"))
        self.names += [w for w in plain if w.isalpha() and len(w) > 3 and w not in self.names]
        self.memory = Memory(device)
        self._built: tuple[str, str] | None = None
        self._parts: Parts
        self._took: dict[tuple[str, str, str], list[tuple[int, float]]] = {}

    def measure(self, point: Point) -> list[dict[str, Any]]:
        earlier = self._took.setdefault((point.model, point.method, point.dtype), [])
        if self.device.type == "cpu" and expected(point.concepts, earlier) > LONGEST:
            print(f"{point.title}: would take longer than {LONGEST:.0f} s", flush=True)
            return []
        if self._built != (point.model, point.dtype):
            self._parts = None  # type: ignore[assignment]
            self._parts = random_parts(point.model, self.device, getattr(torch, point.dtype))
            self._built = (point.model, point.dtype)
        # What a first call reads of its concepts is none of a later one's.
        names = self.names[:1] if point.call == "first" else self.names[1:][: point.concepts]
        concepts = [Concept(name) for name in names]
        denoiser = self._parts.denoiser
        maps = {name: denoiser.get_submodule(name).weight for name in streams(denoiser)}
        kept = {name: weight.detach().clone() for name, weight in maps.items()}
        trim()
        self.memory.peak()
        if point.method == DEFAULT:
            rows = self._of_library(point, concepts)
        else:
            rows = [self._of_script(point, concepts)]
        with torch.no_grad():
            for name, weight in kept.items():
                maps[name].copy_(weight)
        whole = next(row["seconds"] for row in rows if row["stage"] == "all")
        earlier.append((point.concepts, whole))
        return rows

    def _of_script(self, point: Point, concepts: list[Concept]) -> dict[str, Any]:
        script = (OF_TRANSFORMERS if point.model == "FLUX" else OF_UNETS)[point.method]
        started = time.perf_counter()
        script(self._parts, concepts)
        return self._row(point, "all", time.perf_counter() - started, self.memory.peak())

    def _of_library(self, point: Point, concepts: list[Concept]) -> list[dict[str, Any]]:
        parts = self._parts
        with stages(self.memory) as heard:
            started = time.perf_counter()
            erasure = erase(
                parts.denoiser,
                parts.text_encoder,
                concepts,
                tokenizer=parts.tokenizer,
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
        erasure.restore_(parts.denoiser)
        rows.append(self._row(point, "restore_", time.perf_counter() - started, self.memory.peak()))
        return rows

    def _files(self, point: Point, erasure: Erasure) -> Iterator[dict[str, Any]]:
        with tempfile.TemporaryDirectory() as folder:
            for name, save in (
                ("save", lambda path: erasure.save(path)),
                ("save_lora", lambda path: erasure.save_lora(path, self._parts.denoiser)),
                ("save_weights", lambda path: erasure.save_weights(path, self._parts.denoiser)),
            ):
                path = Path(folder) / f"{name}.safetensors"
                started = time.perf_counter()
                save(path)
                row = self._row(point, name, time.perf_counter() - started, self.memory.peak())
                yield {**row, "file_mb": path.stat().st_size / 2**20}

    def _row(self, point: Point, stage: str, seconds: float, peak: float) -> dict[str, Any]:
        return {
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
            f"{row['model']:>6}, {row['method']:>16}, {row['call']:5} {row['concepts']:4} "
            f"{row['stage']:>16}: {row['seconds']:8.2f} s, {row['peak_mb']:,} MiB{size}"
        )


def main(arguments: argparse.Namespace) -> int:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    default = [name for name in MODELS if device.type == "cuda" or name != "FLUX"]
    asked = list(points(arguments.model or default, device))
    with nothing_kept():
        bench = Bench(device)
        measured(
            asked[:2] if arguments.quick else asked,
            bench.measure,
            lines,
            provenance(arguments.threads),
            file_for("full_size", arguments.out, quick=arguments.quick),
            legend="whole calls, one after the other in one process",
        )
    bench.memory.stop()
    return 0
