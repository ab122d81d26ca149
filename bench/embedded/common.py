"""What the stages share: checkpoints, schedules and number formats."""

from __future__ import annotations

import datetime
import math
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from realera_fast.runtime import fastest_dtype


def log(stage: str, text: str) -> None:
    print(f"{datetime.datetime.now():%H:%M:%S} [{stage}] {text}", flush=True)


def save(path: Path, state: object) -> None:
    """Write a checkpoint that is either whole or absent."""
    part = path.with_suffix(".part")
    torch.save(state, part)
    os.replace(part, path)


def load(path: Path) -> dict:
    return torch.load(path, map_location="cpu", weights_only=True)


@dataclass(frozen=True)
class Training:
    """What a stopped training continues from."""

    path: Path
    parts: tuple
    first: int

    def save(self, step: int, **more: object) -> None:
        """Keep the state after ``step`` steps."""
        states = [part.state_dict() for part in self.parts]
        save(self.path, {"step": step, "parts": states, **more})

    def finish(self) -> None:
        """The result is written: the way to it is no longer needed."""
        self.path.unlink(missing_ok=True)


def resume(path: Path, *parts) -> Training:
    """Put the state that ``path`` holds, if any, into modules, optimizers and schedules."""
    if not path.exists():
        return Training(path, parts, 0)
    state = load(path)
    for part, values in zip(parts, state["parts"], strict=True):
        part.load_state_dict(values)
    return Training(path, parts, state["step"])


def cosine(step: int, steps: int, warmup: int) -> float:
    """Factor of the learning rate: linear warm-up, then half a cosine down to 2 %."""
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def autocast() -> torch.autocast:
    """bfloat16 where the processor multiplies it natively; parameters stay float32."""
    native = fastest_dtype("cpu") == torch.bfloat16
    return torch.autocast("cpu", torch.bfloat16, enabled=native)


def as_batch(pictures: np.ndarray) -> Tensor:
    """uint8 ``[n, h, w, 3]`` to float ``[n, 3, h, w]`` in -1..1."""
    return torch.tensor(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
