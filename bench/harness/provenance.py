"""What a row of measurements says about how it was made."""

from __future__ import annotations

import argparse
import datetime
import functools
import hashlib
import os
import platform
import subprocess
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from harness import ROOT
from realera_fast.runtime import fastest_dtype


def default_dtype() -> str:
    """bfloat16, as the committed rows are; float32 where this machine has it in loops only."""
    found = fastest_dtype("cuda" if torch.cuda.is_available() else "cpu")
    return str(found).removeprefix("torch.")


def add_dtype(parser: argparse.ArgumentParser) -> None:
    """The option `--dtype` of the scripts that draw pictures."""
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default=default_dtype())


def provenance(threads: int | None = None, *, cuda: bool | None = None) -> dict[str, Any]:
    """Device, processor, threads, versions, commit, code and date.

    Args:
        threads: as many as torch has unless said otherwise.
        cuda: whether a GPU was measured; if there is one, unless said otherwise.
    """
    on_gpu = torch.cuda.is_available() if cuda is None else cuda
    status = _git("status", "--porcelain", "--untracked-files=no")
    return {
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "cpu": _processor(),
        "threads": threads or torch.get_num_threads(),
        "torch": torch.__version__,
        "diffusers": version("diffusers"),
        "transformers": version("transformers"),
        "python": platform.python_version(),
        "commit": _git("rev-parse", "--short", "HEAD"),
        "dirty": None if status is None else bool(status),
        "code": code_hash(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


@functools.cache
def code_hash() -> str:
    """Twelve digits of the SHA-256 of the sources that decide what comes out: the package's, the
    native library's, and the bench's."""
    digest = hashlib.sha256()
    for folder in ("realera_fast", "csrc", "bench"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in _SOURCES:
                digest.update(f"{path.relative_to(ROOT).as_posix()}\0".encode())
                digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


_SOURCES = frozenset((".py", ".cpp", ".h", ".cu", ".cuh"))


def where(row: Mapping[str, Any]) -> str:
    """The name of the device that a row was measured on."""
    return str(row["cpu"] if row["device"] == "cpu" else row["device"])


def _git(*arguments: str) -> str | None:
    try:
        run = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        return None
    return run.stdout.strip() if run.returncode == 0 else None


def _processor() -> str:
    listed = Path("/proc/cpuinfo")
    lines = listed.read_text(encoding="utf-8").splitlines() if listed.exists() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    # bench/run.py's --instructions.
    forced = os.environ.get("ATEN_CPU_CAPABILITY")
    return next(named, platform.machine()) + (f", {forced} alone" if forced else "")
