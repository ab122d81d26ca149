"""Committed rows, and tables of them in Markdown."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
DEFAULT = "realera_fast"
"""Name of the library with its default settings, in tables of quality."""
UNERASED = "un-erased model"
"""Name of the model before anything is erased."""


def rows(name: str) -> list[dict[str, Any]]:
    """Rows of a file in `RESULTS`; none if it is not there."""
    path = RESULTS / name
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]


def percent(values: Sequence[float]) -> str:
    """Mean and, of more than one value, standard deviation; a dash for none."""
    if not values:
        return "–"
    mean = 100 * statistics.mean(values)
    if len(values) < 2:
        return f"{mean:.1f}"
    return f"{mean:.1f} ± {100 * statistics.stdev(values):.1f}"


def table(header: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return lines + ["| " + " | ".join(cells) + " |" for cells in body]
