"""Which images the demo makes."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from realera_fast.alignment import AlignmentConfig
from realera_fast.config import EraseConfig
from realera_fast.evaluation import Shot
from realera_fast.runtime import check_types, folded
from realera_fast.text import Concept

ERASE_CONFIG = EraseConfig(alignment=AlignmentConfig(check_seeds=2, check_words=4))
"""The eraser's settings in the demo: its defaults, but a fifth of the images by which alignment
decides whether there is anything left to train on (the demo's images judge the outcome)."""


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """What is erased and how many pictures judge it.

    The defaults draw some 170 pictures before and as many after: most of the job's time.
    """

    thing: str = "dog"
    """The object to erase: one of the embedded model's judged things (ours: one of
    CIFAR-10 that is drawn well and has near relatives, which must survive)."""

    style: str = "mosaic"
    """The style to erase: one of the embedded model's judged styles (ours)."""

    style_anchor: str = "color"
    """What the style becomes: the plain style of the embedded model (ours)."""

    pictures: int = 16
    """Pictures of the erased object, and of the erased style (count; ours)."""

    synonym_pictures: int = 4
    """Pictures of every held-out word (count; ours)."""

    relative_pictures: int = 4
    """Pictures of every near relative of the object (count; ours)."""

    others: int = 36
    """Other things, drawn at random, one picture each (count; ours)."""

    scene_pictures: int = 4
    """Pictures of the object beside another thing, which must stay (count; ours)."""

    style_pictures: int = 4
    """Pictures in every other style (count; ours)."""

    columns: int = 4
    """Seeds shown side by side (count; ours)."""

    batch_size: int = 16
    """Pictures drawn together (count; ours). On a CPU more are no faster, and each batch moves the
    progress bar."""

    steps: int = 6
    """Steps of the sampler, DPM-Solver++ (count; ours): half of what the table recommends for
    DDIM."""

    seed: int = 1000
    """First seed of the pictures (ours)."""

    def __post_init__(self) -> None:
        check_types(self)
        for name in (
            *("pictures", "synonym_pictures", "relative_pictures", "others", "scene_pictures"),
            *("style_pictures", "columns", "batch_size", "steps"),
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"DemoConfig.{name} must be at least 1, got {getattr(self, name)}")


def _check_names(table: Any, config: DemoConfig) -> None:
    """Refuses what the embedded model does not know."""
    names = [thing.name for thing in table.things]
    styles = [style.name for style in table.styles]
    for field, value, known in (
        ("thing", config.thing, names),
        ("style", config.style, styles),
        ("style_anchor", config.style_anchor, styles),
    ):
        if value not in known:
            raise ValueError(f"{field}: the embedded model has no {value!r}; it has {known}")


def plan(table: Any, config: DemoConfig) -> tuple[Shot, ...]:
    """Every picture of the demo.

    Args:
        table: The embedded model's words.
        config: What to erase and how many pictures of each kind.

    Raises:
        ValueError: If the embedded model does not know the thing or the style.
    """
    _check_names(table, config)
    target, style = table.thing(config.thing), table.style(config.style)
    models = [thing for thing in table.things if thing.name != target.name]
    shots: list[Shot] = []

    def add(count: int, prompts: Sequence[str], **fields: Any) -> None:
        for i in range(count):
            shots.append(Shot(prompt=prompts[i % len(prompts)], seed=config.seed + i, **fields))

    about: dict[str, Any] = {"erased": target.name, "kind": "thing"}
    words = table.prompts(target)
    add(
        config.pictures,
        # Whole rows of the grid come from the first template.
        [words[0]] * config.columns + [*words],
        group="erased",
        word=target.name,
        expected=target.name,
        **about,
    )
    for word in table.held_out(target):
        add(
            config.synonym_pictures,
            [table.prompts(target, word)[0]],
            group="synonym",
            word=word,
            expected=target.name,
            **about,
        )
    shown = {thing.name for thing in shown_things(table, config)}
    drawn_once = other_things(table, config)
    for thing in models:
        related, shows = thing.name in target.relatives, thing.name in shown
        if not (related or shows or thing.name in drawn_once):
            continue
        count = config.relative_pictures if related else 1
        add(
            max(count, config.columns) if shows else count,
            [table.prompts(thing)[0]],
            group="relative" if related else "untouched",
            word=thing.name,
            expected=thing.name,
            **about,
        )
    beside = scene_thing(table, config)
    if beside is not None:
        add(
            max(config.scene_pictures, config.columns),
            [table.scene(target, beside)],
            group="untouched",
            word=f"{target.name} and {beside.name}",
            expected=beside.name,
            **(about | {"kind": "scene"}),
        )
    about = {"erased": style.name, "kind": "style"}
    # The same things in every style, of all kinds however few the pictures.
    in_style = list(models)
    random.Random(0).shuffle(in_style)
    for word, group, count in (
        (style.name, "erased", config.pictures),
        *((synonym, "synonym", config.synonym_pictures) for synonym in table.held_out(style)),
        *(
            (other.name, "untouched", config.style_pictures)
            for other in table.styles
            if other.name != style.name
        ),
    ):
        add(
            count,
            [table.styled(word, thing) for thing in in_style],
            group=group,
            word=word,
            expected=style.name if group == "synonym" else word,
            **about,
        )
    return tuple(shots)


def other_things(table: Any, config: DemoConfig) -> set[str]:
    """Names of the things that stand for all that an erasure should not touch."""
    target = table.thing(config.thing)
    names = [t.name for t in table.things if t.name not in (target.name, *target.relatives)]
    return set(random.Random(0).sample(names, min(config.others, len(names))))


def scene_thing(table: Any, config: DemoConfig) -> Any | None:
    """What stands beside the object in the scene: the first stranger of another category."""
    target = table.thing(config.thing)
    for thing in shown_things(table, config):
        if thing.category != target.category and thing.name not in target.relatives:
            return thing
    return None


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
        held_out += table.held_out(entry)
    given = {folded(w) for c in concepts for w in (*c.words, c.destination or "")}
    leaked = [word for word in held_out if folded(word) in given]
    if leaked:
        raise ValueError(
            f"concepts name held-out words {leaked}: generality could not be measured with them"
        )
    return held_out


def listed_words(words: Sequence[str]) -> str:
    return ", ".join(repr(word) for word in words)
