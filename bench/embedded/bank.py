"""The rendered pictures that everything is trained on, and the scenes that they show."""

from __future__ import annotations

import os
import random
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing import Pool
from pathlib import Path

import numpy as np

from embedded.captions import Caption, caption
from embedded.common import log
from embedded.drawing import SIZE, Scene, draw
from embedded.heard import heard_words
from embedded.world import world_of
from realera_fast.embedded import words

PER_THING = 130
"""Pictures of a thing alone in color, a fifth of them in a setting."""
PER_STYLE = 14
"""Pictures of a thing alone in each other style."""
SCENES = 30_000
"""Pictures of two things."""
SETTING_SHARE = 0.2
SCENE_STYLED_SHARE = 0.3
CHUNK = 500


def scenes(seed: int, per_thing: int, per_style: int, pairs: int) -> list[Scene]:
    """Every thing alone in every style, and pairs of things, in a fixed order."""
    table, rng = words(), random.Random(seed)
    things, styles = range(len(table.things)), range(len(table.styles))

    def setting() -> str | None:
        return rng.choice(table.settings) if rng.random() < SETTING_SHARE else None

    out = [Scene((t,), 0, setting()) for t in things for _ in range(per_thing)]
    out += [Scene((t,), s) for t in things for s in styles[1:] for _ in range(per_style)]
    for _ in range(pairs):
        pair = tuple(rng.sample(things, 2))
        if rng.random() < SCENE_STYLED_SHARE:
            out.append(Scene(pair, rng.choice(styles[1:])))
        else:
            out.append(Scene(pair, 0, setting()))
    return out


def render(shown: list[Scene], seed: int, first: int, aligned: bool = False) -> np.ndarray:
    """Pictures of scenes, each from a generator of its own; `aligned` as in `drawing.place`."""
    table = words()
    return np.stack(
        [
            draw(
                [table.things[t].glyph for t in scene.things],
                table.styles[scene.style].name,
                scene.setting,
                np.random.default_rng([seed, first + i]),
                aligned,
            )
            for i, scene in enumerate(shown)
        ]
    )


def render_all(shown: list[Scene], seed: int, workers: int = 2) -> np.ndarray:
    """Pictures ``[n, SIZE, SIZE, 3]``, the same for equal seeds."""
    jobs = [(shown[i : i + CHUNK], seed, i) for i in range(0, len(shown), CHUNK)]
    with Pool(workers) as pool:
        return np.concatenate(pool.starmap(render, jobs, chunksize=2))


@dataclass(frozen=True)
class Bank:
    """Pictures, what they show, and one caption of each."""

    pictures: np.ndarray
    """uint8 ``[n, SIZE, SIZE, 3]``, mapped from the disk."""
    scenes: list[Scene]
    seed: int
    """Of the captions."""

    @property
    def captions(self) -> list[Caption]:
        return captions_of(self.seed, len(self.scenes))

    @property
    def heard_captions(self) -> list[Caption]:
        """Others, of further words."""
        table, rng = words(), random.Random(self.seed + 10)
        heard = heard_words(table)
        return [caption(table, scene, rng, heard) for scene in self.scenes]


def bank_scenes(seed: int) -> list[Scene]:
    return scenes(seed, PER_THING, PER_STYLE, SCENES)


@lru_cache(maxsize=1)
def captions_of(seed: int, count: int) -> list[Caption]:
    """A caption of every scene of the bank, the same in every stage."""
    table, rng = words(), random.Random(seed + 3)
    return [caption(table, scene, rng) for scene in bank_scenes(seed)[:count]]


def stage_bank(work: Path) -> None:
    """Render everything once."""
    path = work / "bank.npy"
    if path.exists():
        return log("bank", "already there")
    seed = world_of(work).seed
    shown = bank_scenes(seed)
    log("bank", f"rendering {len(shown)} pictures")
    part = work / "bank.part.npy"
    np.save(part, render_all(shown, seed))
    os.replace(part, path)


def open_bank(work: Path) -> Bank:
    pictures = np.load(work / "bank.npy", mmap_mode="r")
    if pictures.shape[1:] != (SIZE, SIZE, 3):
        raise ValueError(f"bank.npy: expected pictures of {SIZE} pixels, got {pictures.shape}")
    seed = world_of(work).seed
    return Bank(pictures, bank_scenes(seed), seed)


class Sampler:
    """Draws rows of the bank: by kind of picture, then evenly."""

    def __init__(
        self,
        scenes: list[Scene],
        seed: int,
        scene_share: float = 0.25,
        styled_share: float = 0.45,
    ) -> None:
        """
        Args:
            scene_share: of pictures of two things.
            styled_share: of the others, those in another style than the plain one.
        """
        self.rng = np.random.default_rng(seed)
        lone = [i for i, s in enumerate(scenes) if len(s.things) == 1]
        self.groups = [
            np.array([i for i in lone if scenes[i].style == 0]),
            np.array([i for i in lone if scenes[i].style != 0]),
            np.array([i for i, s in enumerate(scenes) if len(s.things) == 2]),
        ]
        lone_share = 1 - scene_share
        plain_share = lone_share * (1 - styled_share)
        self.shares = np.array([plain_share, lone_share * styled_share, scene_share])

    def __call__(self, count: int) -> np.ndarray:
        """Row numbers ``[count]``."""
        kinds = self.rng.choice(3, count, p=self.shares)
        return np.array([self.rng.choice(self.groups[kind]) for kind in kinds])
