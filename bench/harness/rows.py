"""Rows: read where they are committed, written as they are measured."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from harness import OUT, RESULTS


def committed(name: str) -> list[dict[str, Any]]:
    """Rows of a file in `RESULTS`; none if it is not there."""
    path = RESULTS / name
    return read(path) if path.exists() else []


def committed_object(name: str) -> dict[str, Any] | None:
    """The object of a JSON file in `RESULTS`; `None` if it is not there."""
    path = RESULTS / name
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def read(path: Path) -> list[dict[str, Any]]:
    """Rows of a file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]


def file_for(case: str, out: Path | None, *, quick: bool) -> Path:
    """Where the rows of a case go: `out` if it is given, else results/, or out/ if quick."""
    return out or (OUT if quick else RESULTS) / f"{case}.jsonl"


def measured(
    points: Iterable[Any],
    measure: Callable[[Any], list[dict[str, Any]]],
    show: Callable[[list[dict[str, Any]]], Iterable[str]],
    about: Mapping[str, Any],
    out: Path,
    *,
    seconds: float = float("inf"),
    legend: str = "others: times the library",
) -> list[dict[str, Any]]:
    """Measures points and writes their rows to `out`, which is complete or as it was.

    Args:
        points: each with a `title`.
        measure: rows of a point.
        show: lines to print about these.
        about: what all rows have in common, the run's provenance.
        seconds: points that come later are left out.
        legend: what the printed numbers are.
    """
    started = time.perf_counter()
    print(*(f"{name}: {value}" for name, value in about.items()), sep=", ")
    print(legend, flush=True)
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
    if not rows:
        raise SystemExit("nothing was measured: this machine is too busy for a quick run")
    unfinished.replace(out)
    return rows
