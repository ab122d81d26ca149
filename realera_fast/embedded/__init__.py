"""The embedded model: a small, complete text-to-image pipeline that ships with the library.

Everything a concept is called, drawn as and judged by comes from one table, ``words.json``; the
pipeline is a stock ``StableDiffusionPipeline`` folder and the judge a small classifier. Heavy
imports happen inside the loaders, so importing this module costs only the standard library.
"""

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from diffusers import StableDiffusionPipeline

    from realera_fast.embedded.judge import Judge

__all__ = ["FOLDER", "Style", "Thing", "Words", "load_judge", "load_pipeline", "words"]

FOLDER = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Thing:
    """Something the model can draw."""

    name: str
    """Canonical word: what the eraser is told and what the judge answers."""
    glyph: str
    """The character that was rendered for training."""
    kind: str
    """``object``, ``character`` or ``weapon``."""
    category: str
    """The broader word (``animal``, ``vehicle``, ...)."""
    article: str
    """``a`` or ``an``."""
    synonyms: tuple[str, ...]
    """Other words for the same thing; never told to the eraser."""
    relatives: tuple[str, ...]
    """Names of near relatives that an erasure must leave alone."""
    split: str
    """``judged`` (its tables are published) or ``tuning``."""


@dataclass(frozen=True)
class Style:
    """A manner of drawing."""

    name: str
    synonyms: tuple[str, ...]
    split: str


@dataclass(frozen=True)
class Words:
    """The table of ``words.json``."""

    things: tuple[Thing, ...]
    styles: tuple[Style, ...]
    templates: dict[str, tuple[str, ...]]
    """Captions per kind; ``{}`` takes the thing's word and ``{style}`` the style's."""
    sampling: dict[str, Any]
    """Recommended arguments of the pipeline call."""

    def thing(self, name: str) -> Thing:
        """The thing called ``name``."""
        for thing in self.things:
            if thing.name == name:
                return thing
        raise KeyError(f"no thing called {name!r}")

    def style(self, name: str) -> Style:
        """The style called ``name``."""
        for style in self.styles:
            if style.name == name:
                return style
        raise KeyError(f"no style called {name!r}")


@lru_cache(maxsize=1)
def words() -> Words:
    """The table, read once."""
    table = json.loads((FOLDER / "words.json").read_text(encoding="utf-8"))
    things = tuple(
        Thing(
            **{
                **row,
                "glyph": chr(int(row["glyph"].removeprefix("U+"), 16)),
                "synonyms": tuple(row["synonyms"]),
                "relatives": tuple(row["relatives"]),
            }
        )
        for row in table["things"]
    )
    styles = tuple(Style(**{**row, "synonyms": tuple(row["synonyms"])}) for row in table["styles"])
    templates = {kind: tuple(lines) for kind, lines in table["templates"].items()}
    return Words(things, styles, templates, table["sampling"])


def load_pipeline(dtype: "torch.dtype | None" = None) -> "StableDiffusionPipeline":
    """The embedded pipeline on the CPU, in ``dtype`` (float32 by default), progress bar off."""
    import torch
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(
        FOLDER / "pipeline",
        safety_checker=None,
        local_files_only=True,
        use_safetensors=True,
    )
    pipe.set_progress_bar_config(disable=True)
    # Cast afterwards: the loader's argument is named differently in older and newer releases.
    wanted = torch.float32 if dtype is None else dtype
    for module in (pipe.unet, pipe.vae, pipe.text_encoder):
        if module.dtype != wanted:
            module.to(wanted)
    return pipe


def load_judge() -> "Judge":
    """The classifier that names the thing and the style of a picture."""
    from realera_fast.embedded.judge import Judge

    return Judge.load()
