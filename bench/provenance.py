"""What a row of measurements says about how it was made."""

from __future__ import annotations

import datetime
import platform
import subprocess
from typing import Any

import torch


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
