"""The gallery of docs/: pictures of each kind of erasure, from the embedded model.

python bench/run.py gallery            # draws docs/gallery/ and writes docs/gallery.md: minutes
python bench/run.py gallery strict     # draws one of them again
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from realera_fast import Concept, EraseConfig, embedded, erase
from realera_fast.evaluation import Group, before_after_grid, verify

DOCS = Path(__file__).resolve().parents[2] / "docs"
FOLDER, PAGE = DOCS / "gallery", DOCS / "gallery.md"
CLOSED = replace(EraseConfig(), alignment=replace(EraseConfig().alignment, enabled=False))
SEEDS = (0, 1)
TILE = 64
QUALITY = 88
"""Of the JPEG files."""


@dataclass(frozen=True, kw_only=True)
class Exhibit:
    """One erasure and what is drawn of it."""

    title: str
    call: str
    """As a reader would write it."""

    concepts: tuple[str | Concept, ...]
    prompts: Mapping[Group, tuple[str, ...]]
    """Prompts by what they are to the erasure; synonyms are none that `concepts` names."""

    about: str
    config: EraseConfig = CLOSED


EXHIBITS: Mapping[str, Exhibit] = {
    "thing": Exhibit(
        title="A thing",
        call='erase(pipe, ["cat"])',
        concepts=("cat",),
        prompts={
            "erased": ("a photo of a cat",),
            "synonym": ("a photo of a kitten", "a photo of a tomcat"),
            "relative": ("a photo of a tiger",),
            "untouched": ("a photo of a castle",),
        },
        about="Nobody named *kitten* and *tomcat*: they were mined.",
    ),
    "character": Exhibit(
        title="A character",
        call='erase(pipe, ["mermaid"])',
        concepts=("mermaid",),
        prompts={
            "erased": ("a portrait of a mermaid",),
            "synonym": ("a portrait of a siren", "a portrait of mermaids"),
            "relative": ("a portrait of a fairy",),
            "untouched": ("a portrait of a clown",),
        },
        about="Names of characters have synonyms that no lexicon lists: these two were found.",
    ),
    "style": Exhibit(
        title="A style",
        call='erase(pipe, [Concept("mosaic", anchor="color", kind="style")])',
        concepts=(Concept("mosaic", anchor="color", kind="style"),),
        prompts={
            "erased": ("a dog in the style of mosaic", "a mosaic picture of a castle"),
            "synonym": ("a dog in the style of tesserae",),
            "untouched": ("a dog in the style of charcoal", "a photo of a dog"),
        },
        about="What is drawn stays, in the plain style of the model. *tesserae*, which nobody "
        "named, still draws mosaic.",
    ),
    "category": Exhibit(
        title="A category",
        call='erase(pipe, [Concept("weapon", kind="explicit")])',
        concepts=(Concept("weapon", kind="explicit"),),
        prompts={
            "erased": ("a photo of a weapon",),
            "synonym": ("a photo of a sword", "a photo of a pistol", "a photo of a bomb"),
            "untouched": ("a photo of a hammer",),
        },
        about="Members are found by the lexicon and by drawing words; none is named. It is the "
        "coarsest of all: *bomb* was not found and stays, and *hammer*, a tool, went along. Name "
        "such words as `synonyms` or in `preserve=`.",
    ),
    "several": Exhibit(
        title="Several at once",
        call='erase(pipe, ["dog", "apple", "guitar", "castle", "owl"])',
        concepts=("dog", "apple", "guitar", "castle", "owl"),
        prompts={
            "erased": ("a photo of a dog", "a photo of an apple", "a photo of an owl"),
            "relative": ("a photo of a wolf", "a photo of a pear"),
            "untouched": ("a photo of a snowman",),
        },
        about="One solve for all five.",
    ),
    "strict": Exhibit(
        title="Strict",
        call='erase(pipe, ["cat"], config=EraseConfig.strict())',
        concepts=("cat",),
        prompts={
            "erased": ("a photo of a cat",),
            "synonym": ("a photo of a kitten", "a photo of a tomcat"),
            "relative": ("a photo of a tiger",),
            "untouched": ("a photo of a castle",),
        },
        about="The name is moved past its anchor: it seldom looks like anything any more.",
        config=EraseConfig.strict(),
    ),
}


def draw(exhibit: Exhibit, pipe: Any, path: Path, sampling: Mapping[str, Any]) -> None:
    """Erases, draws before and after from the same seeds, and takes the erasure back.

    Args:
        path: the JPEG file to write.
        sampling: steps, guidance and size.
    """
    result = erase(pipe, list(exhibit.concepts), config=exhibit.config, progress=False)
    groups = [(group, text) for group, texts in exhibit.prompts.items() for text in texts]
    found = verify(pipe, result, [t for _, t in groups], seeds=SEEDS, progress=False, **sampling)
    result.restore_(pipe.unet)
    named = {text: group for group, text in groups}
    rows = [replace(row, group=named[row.prompt]) for row in found.rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    before_after_grid(rows, tile=TILE).convert("RGB").save(path, quality=QUALITY, optimize=True)


def page() -> str:
    """docs/gallery.md."""
    parts = [
        "# Gallery",
        "Drawn by `python bench/run.py gallery` from the embedded model, by the closed form alone, "
        "on a CPU: the same seeds before and after, none of them chosen. Where no anchor is named, "
        "the library chose what a concept becomes. Words under *synonyms of the erased* were not "
        "named to the eraser. How often what is shown here happens is in "
        "[Quality](results/quality.md).",
    ]
    for name, exhibit in EXHIBITS.items():
        parts += [
            f"## {exhibit.title}",
            f"`{exhibit.call}`",
            exhibit.about,
            f"![{exhibit.title}: before and after](gallery/{name}.jpg)",
        ]
    return "\n\n".join(parts) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="run.py gallery",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(EXHIBITS)}")
    names = parser.parse_args(argv).names or list(EXHIBITS)
    unknown = [name for name in names if name not in EXHIBITS]
    if unknown:
        parser.error(f"no such exhibit: {unknown[0]}; expected some of {', '.join(EXHIBITS)}")
    table = embedded.words().sampling
    sampling = {
        "steps": table["steps"],
        "guidance": table["guidance_scale"],
        "height": table["height"],
        "width": table["width"],
        "batch_size": 16,
    }
    pipe = embedded.load_pipeline()
    for name in names:
        draw(EXHIBITS[name], pipe, FOLDER / f"{name}.jpg", sampling)
        print(f"drew {FOLDER.name}/{name}.jpg", flush=True)
    PAGE.write_text(page(), encoding="utf-8")
    return 0
