"""What a row of measurements says about how it was made."""

from __future__ import annotations

import argparse
import datetime
import platform
import subprocess
from typing import Any

import torch

from realera_fast.precision import fastest_dtype


def default_dtype() -> str:
    """bfloat16, as the committed rows are; float32 where this machine has it in loops only."""
    found = fastest_dtype("cuda" if torch.cuda.is_available() else "cpu")
    return str(found).removeprefix("torch.")


def add_dtype(parser: argparse.ArgumentParser) -> None:
    """The option `--dtype` of the scripts that draw pictures."""
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default=default_dtype())


def provenance() -> dict[str, Any]:
    """Date, commit, device, threads and versions."""

    def git(*arguments: str) -> str:
        run = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False)
        return run.stdout.strip()

    import diffusers
    import transformers

    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": git("rev-parse", "--short", "HEAD"),
        "dirty": bool(git("status", "--porcelain", "--untracked-files=no")),
        "device": "cuda" if torch.cuda.is_available() else f"cpu {platform.machine()}",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
    }
