"""Compiles instead of interpreting: takes back the choice that the other tests make on a CPU."""

from __future__ import annotations

import os
import sys

# Triton reads this once, when it is first imported; the tests skip if that has already happened.
if "triton" not in sys.modules:
    os.environ["TRITON_INTERPRET"] = "0"

import pytest


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    """Compiles every time, whatever an earlier run left behind."""
    import triton

    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path / "cache"))
