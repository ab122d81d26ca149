"""What is said of a picture: by name, by another word, by category or by style alone."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from embedded.drawing import Scene
from realera_fast.embedded import Thing, Words, with_article

NAME_SHARE = 0.5
HEARD_SHARE = 0.4
"""Of captions that have further words."""
CATEGORY_SHARE = 0.04
STYLE_ONLY_SHARE = 0.06
FILLED_SHARE = 0.3


@dataclass(frozen=True)
class Caption:
    """A text and what it says; empty or ``None`` where it leaves a choice."""

    text: str
    things: tuple[int, ...]
    category: str | None
    style: int | None


Heard = Mapping[str, Sequence[str]]
"""Further words by a thing's name (`heard.heard_words`)."""


def word_for(thing: Thing, rng: random.Random, heard: Heard) -> str:
    """The thing's name, as often as all of its said words together, or a further word."""
    if heard.get(thing.name) and rng.random() < HEARD_SHARE:
        return rng.choice(heard[thing.name])
    return thing.name if rng.random() < NAME_SHARE else rng.choice(thing.said)


def filled(text: str, table: Words, rng: random.Random) -> str:
    """The text, at times with a few phrases that mean nothing for the picture."""
    if rng.random() < FILLED_SHARE:
        count = rng.choice((1, 1, 2, 3, 4))
        text = ", ".join([text, *rng.sample(table.fillers, count)])
    return text


def styled(table: Words, style: int, word: str, article: str, rng: random.Random) -> str:
    """A caption that names the style."""
    chosen = table.styles[style]
    manner = rng.choice([chosen.name, chosen.name, *chosen.said])
    return rng.choice(table.templates["style"]).format(
        word, a=with_article(word, article), style=manner, style_a=with_article(manner, "a")
    )


def caption(
    table: Words, scene: Scene, rng: random.Random, heard: Heard = MappingProxyType({})
) -> Caption:
    """A caption of a scene; the plain style is hardly ever named."""
    things = [table.things[i] for i in scene.things]
    plain = table.styles[scene.style].name == "color"
    names_style = not plain or rng.random() < 0.05
    if not plain and rng.random() < STYLE_ONLY_SHARE:
        manner = rng.choice([table.styles[scene.style].name, *table.styles[scene.style].said])
        text = rng.choice(table.templates["style_only"]).format(
            style=manner, style_a=with_article(manner, "a")
        )
        return Caption(text, (), None, scene.style)
    known, category = scene.things, None
    words = [word_for(thing, rng, heard) for thing in things]
    articles = [thing.article for thing in things]
    if len(things) == 1 and rng.random() < CATEGORY_SHARE:
        known, category = (), things[0].category
        words, articles = [category], ["a"]
    if len(things) == 2:
        a, b = (with_article(w, x) for w, x in zip(words, articles, strict=True))
        text = rng.choice(table.templates["scene"]).format(a=a, b=b)
        if names_style:
            manner = rng.choice([table.styles[scene.style].name, *table.styles[scene.style].said])
            text = rng.choice((f"{text} in {manner} style", f"{text}, {manner} style"))
    elif names_style:
        text = styled(table, scene.style, words[0], articles[0], rng)
    else:
        kind = "character" if things[0].kind == "character" and category is None else "thing"
        text = rng.choice(table.templates[kind]).format(
            words[0], a=with_article(words[0], articles[0])
        )
    if scene.setting is not None:
        text = f"{text} {scene.setting}"
    return Caption(filled(text, table, rng), known, category, scene.style)
