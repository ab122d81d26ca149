"""Clocks, and what is said of their times."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch


class Percentiles(NamedTuple):
    """What is published of repeated times."""

    p20: float
    p50: float
    p80: float

    def milliseconds(self) -> dict[str, float]:
        """The fields of a row, of times in milliseconds."""
        return {"p20_ms": self.p20, "p50_ms": self.p50, "p80_ms": self.p80}


def percentiles(values: Sequence[float]) -> Percentiles:
    """Percentiles, interpolated between values."""
    ordered = sorted(values)

    def at(fraction: float) -> float:
        place = fraction * (len(ordered) - 1)
        low = int(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (place - low) * (ordered[high] - ordered[low])

    return Percentiles(at(0.2), at(0.5), at(0.8))


class Clock:
    """Times steps that run one after the other, by the device's own clock."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"

    def _mark(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, start: Any, end: Any) -> float:
        return float(start.elapsed_time(end)) if self.cuda else 1e3 * (end - start)

    def laps(self, *steps: Callable[[], object]) -> list[float]:
        """Milliseconds of each step, and of all."""
        if self.cuda:
            torch.cuda.synchronize()
        marks = [self._mark()]
        for step in steps:
            step()
            marks.append(self._mark())
        if self.cuda:
            torch.cuda.synchronize()
        each = [self._between(a, b) for a, b in zip(marks, marks[1:], strict=False)]
        return [*each, self._between(marks[0], marks[-1])]

    def milliseconds(self, run: Callable[[], object]) -> float:
        """Of one run."""
        return self.laps(run)[-1]

    def best_seconds(
        self, run: Callable[[], object], repetitions: int, least: float = 0.0
    ) -> float:
        """The 20th percentile of the repetitions, of at least `least` seconds of them."""
        run()
        taken: list[float] = []
        while len(taken) < repetitions or sum(taken) < least and len(taken) < 200:
            taken.append(self.milliseconds(run) / 1e3)
        return percentiles(taken).p20
