"""What every script of this folder shares: where things are, rows, tables, clocks, shapes."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
"""The repository."""
RESULTS = ROOT / "bench" / "results"
"""Committed rows: every published number comes from them."""
OUT = ROOT / "out"
"""What is made here and not committed."""
