"""Rows of a run, written as they are measured."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any


def measured(
    points: Iterable[Any],
    measure: Callable[[Any], list[dict[str, Any]]],
    show: Callable[[list[dict[str, Any]]], Iterable[str]],
    about: Mapping[str, Any],
    out: Path,
    *,
    seconds: float = float("inf"),
) -> list[dict[str, Any]]:
    """Measures points and writes their rows to `out`, which is complete or as it was.

    Args:
        points: each with a `title`.
        measure: rows of a point.
        show: lines to print about these.
        about: what all rows have in common, the run's provenance.
        seconds: points that come later are left out.
    """
    started = time.perf_counter()
    print(*(f"{name}: {value}" for name, value in about.items()), sep=", ")
    print("others: times the library", flush=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    # Half a run must not pass for a whole one.
    unfinished = out.with_suffix(".unfinished")
    rows: list[dict[str, Any]] = []
    for point in points:
        if time.perf_counter() - started > seconds:
            print(f"{point.title}: no time to measure it")
            continue
        found = measure(point)
        rows += [{**row, **about} for row in found]
        unfinished.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        for line in show(found):
            print(line, f"[{time.perf_counter() - started:.0f} s]", flush=True)
    unfinished.replace(out)
    return rows
