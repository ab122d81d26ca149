"""What one trained model differs by from another that knows the same table of words."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from realera_fast.runtime import write_atomically

FILE = "world.json"
RESULTS = (".npy", ".pt", ".safetensors")
"""Endings of what stages leave in the work folder."""
HEAD_WIDTH = 32
"""Of every head of the text encoder."""
WIDEST = 384
"""The teacher's embeddings have no more axes."""
FEWEST_TOKENS = 515
"""Every byte, inside of a word and at its end, start and end of a text, and one merge."""


@dataclass(frozen=True)
class World:
    """The choices that make a model; the default is the shipped one."""

    seed: int = 20240
    """Of every random choice; each stage adds a number of its own."""
    text_width: int = 192
    """Of the text encoder's states."""
    tokens: int = 49_408
    """Of the tokenizer; as many as CLIP's are CLIP's, others are learned."""

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ValueError(f"--seed {self.seed}: expected 0 or more")
        if self.text_width % HEAD_WIDTH or not 0 < self.text_width <= WIDEST:
            raise ValueError(
                f"--text-width {self.text_width}: expected a multiple of {HEAD_WIDTH} up to "
                f"{WIDEST}, the width of the sentence encoder"
            )
        if self.tokens < FEWEST_TOKENS:
            raise ValueError(f"--tokens {self.tokens}: expected {FEWEST_TOKENS} or more")


def world_of(work: Path) -> World:
    """The world of a work folder: by its file, or the default one."""
    path = work / FILE
    if not path.exists():
        return World()
    fields = json.loads(path.read_text(encoding="utf-8"))
    if set(fields) != set(asdict(World())):
        raise ValueError(f"{path}: expected {', '.join(asdict(World()))}, got {', '.join(fields)}")
    return World(**fields)


def choose_world(work: Path, **options: int | None) -> World:
    """The world of a work folder, or, where none has begun in it, that of the options.

    Args:
        options: Fields of `World`; ``None`` is none given.

    Raises:
        ValueError: An option contradicts the folder, or is out of its range.
    """
    given = {name: value for name, value in options.items() if value is not None}
    path = work / FILE
    if not path.exists() and not any(file.suffix in RESULTS for file in work.glob("*")):
        return World(**given)
    world = world_of(work)
    for name, value in given.items():
        if value != getattr(world, name):
            says = f"{path} says" if path.exists() else f"{work} has results and no {FILE}: it is"
            raise ValueError(
                f"--{name.replace('_', '-')} {value}: {says} {getattr(world, name)}; leave the "
                "option out, or train in another --work folder"
            )
    return world


def keep_world(work: Path, world: World) -> None:
    """Write the folder's file, once."""
    if not (work / FILE).exists():
        write_atomically(work / FILE, (json.dumps(asdict(world)) + "\n").encode())
