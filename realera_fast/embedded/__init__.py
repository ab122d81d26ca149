"""The embedded model: a small, complete text-to-image pipeline that ships with the library.

Everything a concept is called, drawn as and judged by comes from one table, ``words.json``; the
pipeline is a stock ``StableDiffusionPipeline`` folder and the judge a small classifier. Heavy
imports happen inside the loaders, so importing this module costs only the standard library.
"""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    import torch
    from diffusers import StableDiffusionPipeline

    from realera_fast.embedded.judge import Judge

__all__ = [
    "ACCURACY",
    "FOLDER",
    "Style",
    "Thing",
    "Words",
    "load_judge",
    "load_pipeline",
    "with_article",
    "words",
]

FOLDER = Path(__file__).resolve().parent
ACCURACY = "accuracy.json"
"""Beside the table: how often the un-erased model draws what a word means."""


@dataclass(frozen=True)
class Thing:
    """Something the model can draw."""

    name: str
    """What the eraser is told and what the judge answers."""
    glyph: str
    """The character that was rendered for training."""
    kind: str
    """``object``, ``character`` or ``weapon``."""
    category: str
    """The broader word (``animal``, ``vehicle``, ...)."""
    article: str
    """``a`` or ``an``, or nothing before a proper name."""
    said: tuple[str, ...]
    """Other words for it that stood in captions; never told to the eraser."""
    unsaid: tuple[str, ...]
    """Words for it that stood in no caption: synonyms, kinds, plurals, foreign or rare words, short
    descriptions; never told to the eraser."""
    relatives: tuple[str, ...]
    """Names of near relatives that an erasure must leave alone."""
    split: str
    """``judged`` (its tables are published) or ``tuning``."""


@dataclass(frozen=True)
class Style:
    """A manner of drawing."""

    name: str
    said: tuple[str, ...]
    unsaid: tuple[str, ...]
    split: str


def with_article(word: str, article: str) -> str:
    """A word or phrase as prompts use it: "an owl", "socks", "a small furry pet".

    Args:
        word: The word or phrase.
        article: Of its thing; empty where that takes none.
    """
    if not article or word.split()[0] in ("a", "an", "the"):
        return word
    vowel = word[0] in "aeiou" and not word.startswith(_SPOKEN_LIKE_YOU)
    return f"{'an' if vowel else 'a'} {word}"


_SPOKEN_LIKE_YOU = ("eu", "ufo", "unic")
"""Beginnings of words that are written with a vowel and not spoken with one."""


@dataclass(frozen=True)
class Words:
    """The table of ``words.json``."""

    things: tuple[Thing, ...]
    styles: tuple[Style, ...]
    templates: dict[str, tuple[str, ...]]
    """Captions per kind. ``{}`` takes the word, ``{a}`` the word with its article, ``{b}`` a second
    one's, ``{style}`` and ``{style_a}`` the style's."""
    fillers: tuple[str, ...]
    """Phrases of captions that mean nothing for the picture."""
    settings: tuple[str, ...]
    """Phrases of captions that say where a thing is drawn."""
    sampling: dict[str, Any]
    """Recommended arguments of the pipeline call."""
    accuracy: dict[str, float]
    """Share of the un-erased model's pictures of a word that show its thing (names, said and unsaid
    words)."""
    counts_from: ClassVar[float] = 0.6
    """Unsaid words of this accuracy or more count when generality is measured."""

    def prompts(self, thing: Thing, word: str | None = None) -> tuple[str, ...]:
        """Three plain prompts for a thing, by its name or by another word for it."""
        text = with_article(word or thing.name, thing.article)
        return tuple(f"{start} of {text}" for start in ("a photo", "a picture", "an image"))

    def styled(self, word: str, thing: Thing) -> str:
        """A prompt for a thing in a style, by the style's name or by another word for it."""
        text = with_article(thing.name, thing.article)
        return self.templates["style"][0].format(thing.name, a=text, style=word, style_a=word)

    def scene(self, first: Thing, second: Thing) -> str:
        """A prompt for two things side by side."""
        a, b = (with_article(thing.name, thing.article) for thing in (first, second))
        return f"a photo of {a} and {b}"

    def held_out(self, entry: Thing | Style) -> tuple[str, ...]:
        """The words that measure generality: those said in captions and the unsaid that count."""
        return (*entry.said, *self.counted(entry))

    def counted(self, entry: Thing | Style) -> tuple[str, ...]:
        """The unsaid words that the un-erased model draws often enough to be counted."""
        return tuple(w for w in entry.unsaid if self.accuracy.get(w, 0.0) >= self.counts_from)

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

    def spoken(self) -> list[str]:
        """Every word and phrase that captions are made of, once each."""
        rows = [(t.name, *t.said, t.category) for t in self.things]
        rows += [(s.name, *s.said) for s in self.styles]
        return list(dict.fromkeys(text for row in rows for text in row))


@cache
def words(folder: str | Path | None = None) -> Words:
    """The table, read once; of the model in ``folder``, as the training exports one, if given."""
    folder = FOLDER if folder is None else Path(folder)
    table = json.loads((folder / "words.json").read_text(encoding="utf-8"))

    drawn = folder / ACCURACY
    measured = json.loads(drawn.read_text(encoding="utf-8")) if drawn.is_file() else {}

    def row(fields: dict[str, Any]) -> dict[str, Any]:
        return {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}

    things = tuple(
        Thing(**row(fields | {"glyph": chr(int(fields["glyph"].removeprefix("U+"), 16))}))
        for fields in table["things"]
    )
    return Words(
        things,
        tuple(Style(**row(fields)) for fields in table["styles"]),
        row(table["templates"]),
        tuple(table["fillers"]),
        tuple(table["settings"]),
        table["sampling"],
        {word: share for rows in measured.values() for word, share in rows.items()},
    )


def load_pipeline(
    dtype: "torch.dtype | None" = None, folder: str | Path | None = None
) -> "StableDiffusionPipeline":
    """The embedded pipeline on the CPU, in ``dtype`` (float32 by default), progress bar off; or
    that of the model in ``folder``, as the training exports one."""
    import torch
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(
        (FOLDER if folder is None else Path(folder)) / "pipeline",
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


def load_judge(folder: str | Path | None = None) -> "Judge":
    """What says which things a picture shows, in which style, and whether it is junk; of the model
    in ``folder``, as the training exports one, if given."""
    from realera_fast.embedded.judge import Judge

    if folder is None:
        return Judge.load()
    return Judge.load(Path(folder) / "judge.safetensors", words(folder))
