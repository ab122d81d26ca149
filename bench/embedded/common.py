"""What the stages share: checkpoints, schedules, rendered pictures, and how they are drawn."""

from __future__ import annotations

import datetime
import math
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from embedded.emoji_data import Fonts, render_all
from realera_fast.embedded import words
from realera_fast.runtime import fastest_dtype

SEED = 20240
BANK = dict(color_count=200, other_count=56)
STYLE_SHARE = {"color": 0.45}  # the other styles share the rest evenly


def log(stage: str, text: str) -> None:
    print(f"{datetime.datetime.now():%H:%M:%S} [{stage}] {text}", flush=True)


def save(path: Path, state: object) -> None:
    """Write a checkpoint that is either whole or absent."""
    part = path.with_suffix(".part")
    torch.save(state, part)
    os.replace(part, path)


def load(path: Path) -> dict:
    return torch.load(path, map_location="cpu", weights_only=True)


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


def bank(work: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rendered pictures, thing and style indices; rendered on first use."""
    path = work / "bank.npz"
    if not path.exists():
        log("bank", "rendering")
        pictures, things, styles = render_all(Fonts.find(), seed=SEED, **BANK)
        part = work / "bank.part.npz"
        np.savez(part, pictures=pictures, things=things, styles=styles)
        os.replace(part, path)
    data = np.load(path)
    log("bank", f"{len(data['things'])} pictures")
    return data["pictures"], data["things"], data["styles"]


def as_batch(pictures: np.ndarray) -> Tensor:
    """uint8 ``[n, h, w, 3]`` to float ``[n, 3, h, w]`` in -1..1."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


class Sampler:
    """Draws bank rows: things evenly, styles by their share."""

    def __init__(self, things: np.ndarray, styles: np.ndarray, seed: int) -> None:
        table = words()
        self.rng = np.random.default_rng(seed)
        self.rows = {}
        for row, key in enumerate(zip(things.tolist(), styles.tolist(), strict=True)):
            self.rows.setdefault(key, []).append(row)
        self.keys = sorted(self.rows)
        others = (1 - sum(STYLE_SHARE.values())) / (len(table.styles) - len(STYLE_SHARE))
        share = np.array([STYLE_SHARE.get(table.styles[s].name, others) for _, s in self.keys])
        for t in range(len(table.things)):  # a thing without ink is drawn as often as the rest
            mine = np.array([key[0] == t for key in self.keys])
            share[mine] /= share[mine].sum()
        self.share = share / share.sum()

    def __call__(self, count: int) -> tuple[np.ndarray, list[tuple[int, int]]]:
        keys = [self.keys[i] for i in self.rng.choice(len(self.keys), count, p=self.share)]
        return np.array([self.rng.choice(self.rows[key]) for key in keys]), keys
