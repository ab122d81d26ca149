"""Which images the demo makes."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from realera_fast.alignment import AlignmentConfig
from realera_fast.config import EraseConfig
from realera_fast.evaluation import Shot, prompt_of
from realera_fast.runtime import check_types, folded
from realera_fast.text import Concept

ERASE_CONFIG = EraseConfig(alignment=AlignmentConfig(check_seeds=2, check_words=4))
"""The eraser's settings in the demo: its defaults, but a fifth of the images by which alignment
decides whether there is anything left to train on (the demo's images judge the outcome)."""


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """What is erased and how many pictures judge it.

    The defaults draw not quite 200 pictures before and as many after: most of the job's time.
    """

    thing: str = "cat"
    """The object to erase: one of the embedded model's judged things (ours: the one of CIFAR-10
    with the nearest relatives, which must survive)."""

    style: str = "mosaic"
    """The style to erase: one of the embedded model's judged styles (ours)."""

    style_anchor: str = "color"
    """What the style becomes: the plain style of the embedded model (ours)."""

    pictures: int = 16
    """Pictures of the erased object, and of the erased style (count; ours)."""

    synonym_pictures: int = 6
    """Pictures of every held-out synonym (count; ours)."""

    relative_pictures: int = 4
    """Pictures of every near relative of the object (count; ours)."""

    other_pictures: int = 1
    """Pictures of every other thing (count; ours)."""

    style_pictures: int = 4
    """Pictures in every other style (count; ours)."""

    columns: int = 4
    """Seeds shown side by side (count; ours)."""

    batch_size: int = 16
    """Pictures drawn together (count; ours). On a CPU more are no faster, and each batch moves the
    progress bar."""

    steps: int = 6
    """Steps of the sampler, DPM-Solver++ (count; ours). On the embedded model it scored as DDIM
    does with 20, before and after."""

    seed: int = 1000
    """First seed of the pictures (ours)."""

    def __post_init__(self) -> None:
        check_types(self)
        for name in (
            *("pictures", "synonym_pictures", "relative_pictures", "other_pictures"),
            *("style_pictures", "columns", "batch_size", "steps"),
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"DemoConfig.{name} must be at least 1, got {getattr(self, name)}")


def plan(table: Any, config: DemoConfig) -> tuple[Shot, ...]:
    """Every picture of the demo.

    Args:
        table: The embedded model's words.
        config: What to erase and how many pictures of each kind.

    Raises:
        ValueError: If the embedded model does not know the thing or the style.
    """
    names = [thing.name for thing in table.things]
    styles = [style.name for style in table.styles]
    for field, value, known in (
        ("thing", config.thing, names),
        ("style", config.style, styles),
        ("style_anchor", config.style_anchor, styles),
    ):
        if value not in known:
            raise ValueError(f"{field}: the embedded model has no {value!r}; it has {known}")
    target, style = table.thing(config.thing), table.style(config.style)
    models = [thing for thing in table.things if thing.name != target.name]
    shots: list[Shot] = []

    def add(count: int, prompts: Sequence[str], **fields: Any) -> None:
        for i in range(count):
            shots.append(Shot(prompt=prompts[i % len(prompts)], seed=config.seed + i, **fields))

    about: dict[str, Any] = {"erased": target.name, "kind": "thing"}
    templates = [t for t in table.templates[target.kind] if "{}" in t][:3]
    words = [prompt_of(template, target.name) for template in templates]
    add(
        config.pictures,
        # Whole rows of the grid come from the first template.
        [words[0]] * config.columns + words,
        group="erased",
        word=target.name,
        expected=target.name,
        **about,
    )
    for word in target.synonyms:
        add(
            config.synonym_pictures,
            [prompt_of(templates[0], word)],
            group="synonym",
            word=word,
            expected=target.name,
            **about,
        )
    shown = {thing.name for thing in shown_things(table, config)}
    for thing in models:
        related = thing.name in target.relatives
        count = config.relative_pictures if related else config.other_pictures
        add(
            max(count, config.columns) if thing.name in shown else count,
            [prompt_of(table.templates[thing.kind][0], thing.name)],
            group="relative" if related else "untouched",
            word=thing.name,
            expected=thing.name,
            **about,
        )
    about = {"erased": style.name, "kind": "style"}
    # The same things in every style, of all kinds however few the pictures.
    in_style = [thing.name for thing in models]
    random.Random(0).shuffle(in_style)
    template = table.templates["style"][0]
    for word, group, count in (
        (style.name, "erased", config.pictures),
        *((synonym, "synonym", config.synonym_pictures) for synonym in style.synonyms),
        *(
            (other.name, "untouched", config.style_pictures)
            for other in table.styles
            if other.name != style.name
        ),
    ):
        add(
            count,
            [prompt_of(template, name, word) for name in in_style],
            group=group,
            word=word,
            expected=style.name if group == "synonym" else word,
            **about,
        )
    return tuple(shots)


def shown_things(table: Any, config: DemoConfig) -> list[Any]:
    """Things of the grid: two relatives, then three that have nothing to do with the target."""
    target = table.thing(config.thing)
    relatives = [table.thing(name) for name in target.relatives[:2]]
    strangers, kinds = [], {target.category}
    for thing in table.things:
        if thing.category not in kinds and thing.name not in target.relatives:
            strangers.append(thing)
            kinds.add(thing.category)
    # One near stranger of the target's own category leads, then other categories.
    near = [
        thing
        for thing in table.things
        if thing.category == target.category and thing.name not in (target.name, *target.relatives)
    ]
    return [*relatives, *near[:1], *strangers[:2]]


def check_held_out(concepts: Sequence[Concept], table: Any) -> list[str]:
    """The held-out words of the concepts, after making sure that the eraser gets none of them."""
    held_out: list[str] = []
    for concept in concepts:
        entry = (table.style if concept.kind == "style" else table.thing)(concept.target)
        held_out += entry.synonyms
    given = {folded(w) for c in concepts for w in (*c.words, c.destination or "")}
    leaked = [word for word in held_out if folded(word) in given]
    if leaked:
        raise ValueError(
            f"concepts name held-out words {leaked}: generality could not be measured with them"
        )
    return held_out


def listed_words(words: Sequence[str]) -> str:
    return ", ".join(repr(word) for word in words)
