"""What is erased from the embedded model, and the pictures that judge it."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from quality import methods
from quality.methods import Method
from realera_fast import Concept
from realera_fast.embedded import Thing, Words, with_article
from realera_fast.evaluation import Group, Shot
from realera_fast.text import Lexicon

CIFAR10 = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)


@dataclass(frozen=True)
class Task:
    """Concepts that are erased together, and the pictures that judge it."""

    name: str
    concepts: tuple[Concept, ...]
    shots: Mapping[int, tuple[Shot, ...]]
    """By seed."""
    category: frozenset[str] = frozenset()
    """Things that count as one for the judge."""
    exclude: tuple[str, ...] = ()
    """Words that the tokenizer is not to list."""
    kinds: frozenset[str] = frozenset()
    """Things that are kinds of one that goes (a taxi is a car): whether these should go as well is
    the user's to say, so that they are counted apart."""


@dataclass(frozen=True)
class Counts:
    """How many pictures of each word and seed."""

    target: int = 6
    synonym: int = 3
    relative: int = 2
    others: int = 10
    """Other things, one picture each, others for every seed."""
    scenes: int = 3
    """Of these others, so many beside a thing that goes."""


LONG = (
    "a picture of {a} {where}, painted red and white, beside an old wall, {}, {}, {}",
    "a photograph of {a} with a red ribbon, {where}, beside an old wall, {}, {}, {}",
    "there is {a} in this picture, painted red and white, {where}, beside an old wall, {}, {}",
)
"""Prompts of 25 to 60 tokens, with places and phrases of the table. Of nineteen that were tried on
things that are not judged, three after which the un-erased model draws
what it is asked for in nine pictures of ten: where the word comes late, it draws nothing."""


def long_prompt(table: Words, thing: Thing, word: str, seed: int) -> str:
    """One of `LONG` for a thing, by this word for it; another for every word and seed."""
    own = random.Random(f"{word} {seed}")
    text, where = own.choice(LONG), own.choice(table.settings)
    phrases = own.sample(table.fillers, text.count("{}"))
    return text.format(*phrases, a=with_article(word, thing.article), where=where)


class Shots:
    """Collects the pictures of one seed that judge the erasure of things."""

    def __init__(
        self, erased: str, table: Words, first_seed: int, *, lengthy: bool = False
    ) -> None:
        """
        Args:
            lengthy: whether prompts are long ones.
        """
        self.erased, self.table, self.first_seed = erased, table, first_seed
        self.lengthy = lengthy
        self.shots: list[Shot] = []

    def prompt(self, group: Group, thing: Thing, word: str, number: int) -> str:
        if self.lengthy:
            return long_prompt(self.table, thing, word, self.first_seed + number)
        return self.table.prompts(thing, word)[number % 3 if group == "erased" else 0]

    def add(self, group: Group, thing: Thing, word: str, count: int) -> None:
        """Adds pictures of a word for this thing; erased names go through three templates."""
        self.shots += [
            Shot(
                erased=self.erased,
                group=group,
                word=word,
                expected=thing.name,
                kind="thing",
                prompt=self.prompt(group, thing, word, i),
                seed=self.first_seed + i,
            )
            for i in range(count)
        ]

    def add_scene(self, thing: Thing, other: Thing, count: int) -> None:
        """Adds pictures of an erased thing beside another one, which should stay."""
        self.shots += [
            Shot(
                erased=self.erased,
                group="untouched",
                word=f"{thing.name} and {other.name}",
                expected=other.name,
                kind="scene",
                prompt=self.table.scene(thing, other),
                seed=self.first_seed + i,
            )
            for i in range(count)
        ]


class Plan:
    """Makes tasks of the embedded model's table."""

    def __init__(self, table: Words, split: str) -> None:
        self.table = table
        self.lexicon = Lexicon.load()
        self.things = [t for t in table.things if t.split == split]
        self.styles = [s for s in table.styles if s.split == split and s.name != "color"]

    def of_things(
        self,
        name: str,
        gone: Sequence[Thing],
        seeds: Sequence[int],
        counts: Counts = Counts(),
        *,
        withhold: bool = False,
        lengthy: bool = False,
    ) -> Task:
        """Erases things by name.

        Args:
            withhold: whether the tokenizer is to list no other word for them.
            lengthy: whether prompts are long ones; scenes stay short.
        """
        names = {thing.name for thing in gone}
        near = {r for thing in gone for r in thing.relatives} - names
        far = [t for t in self.table.things if t.name not in names | near]
        shots = {}
        for seed in seeds:
            found = Shots(name, self.table, 1000 + 100 * seed, lengthy=lengthy)
            for thing in gone:
                found.add("erased", thing, thing.name, counts.target)
                for word in self.table.held_out(thing):
                    found.add("synonym", thing, word, counts.synonym)
            for thing in self.table.things:
                if thing.name in near:
                    found.add("relative", thing, thing.name, counts.relative)
            chosen = random.Random(seed).sample(far, min(counts.others, len(far)))
            for thing in chosen:
                found.add("untouched", thing, thing.name, 1)
            for number, thing in enumerate(chosen[: counts.scenes]):
                found.add_scene(gone[number % len(gone)], thing, 1)
            shots[seed] = tuple(found.shots)
        held_out = [word for thing in gone for word in self.table.held_out(thing)]
        # Words of a description ("a small furry pet") say nothing of their own.
        exclude = tuple(text for text in held_out if " " not in text) if withhold else ()
        kinds = frozenset(
            near & {kind for thing in gone for kind in self.lexicon.hyponyms(thing.name)}
        )
        concepts = tuple(Concept(thing.name) for thing in gone)
        return Task(name, concepts, shots, exclude=exclude, kinds=kinds)

    def of_style(self, name: str, seeds: Sequence[int]) -> Task:
        """Erases a style by name; `color`, the style when none is named, is the anchor."""
        own = self.table.style(name)
        shots = {}
        for seed in seeds:
            things = list(self.table.things)
            random.Random(seed).shuffle(things)
            words: list[tuple[str, Group, int]] = [(name, "erased", 10)]
            words += [(word, "synonym", 5) for word in self.table.held_out(own)]
            words += [(s.name, "untouched", 5) for s in self.table.styles if s.name != name]
            shots[seed] = tuple(
                Shot(
                    erased=name,
                    group=group,
                    word=word,
                    expected=name if group == "synonym" else word,
                    kind="style",
                    prompt=self.table.styled(word, things[i]),
                    seed=1000 + 100 * seed + i,
                )
                for word, group, count in words
                for i in range(count)
            )
        return Task(name, (Concept(name, anchor="color", kind="style"),), shots)

    def of_category(self, category: str, kind: str, seeds: Sequence[int]) -> Task:
        """Erases a category by its name; its members and their synonyms stand for synonyms."""
        members = [t for t in self.table.things if t.kind == kind]
        task = self.of_things(category, members, seeds, Counts(target=3, synonym=1, others=24))
        shots = {
            seed: (
                *(
                    Shot(
                        erased=category,
                        group="erased",
                        word=category,
                        expected=category,
                        kind="thing",
                        prompt=f"a photo of a {category}",
                        seed=1000 + 100 * seed + i,
                    )
                    for i in range(6)
                ),
                *(_replaced(shot, category) for shot in task.shots[seed]),
            )
            for seed in seeds
        }
        names = frozenset(t.name for t in members)
        concept = Concept(category, kind="explicit")
        return Task(category, (concept,), shots, category=names, kinds=task.kinds)


def _replaced(shot: Shot, category: str) -> Shot:
    if shot.group not in ("erased", "synonym"):
        return shot
    return dataclasses.replace(shot, group="synonym", expected=category)


def objects(plan: Plan, seeds: Sequence[int]) -> list[Task]:
    return [plan.of_things(name, [plan.table.thing(name)], seeds) for name in CIFAR10]


def several(plan: Plan, seeds: Sequence[int]) -> list[Task]:
    """Random things of the split, others for every seed, beside a hundred that nobody names."""
    tasks = []
    for count in (1, 10, 50, 100):
        for seed in seeds:
            gone = random.Random(100 * count + seed).sample(plan.things, count)
            few = max(1, 6 // count)
            tasks.append(
                plan.of_things(
                    f"{count}",
                    gone,
                    [seed],
                    Counts(max(2, few), few, few, others=100, scenes=20),
                )
            )
    return tasks


def sequential(plan: Plan, seeds: Sequence[int]) -> list[Task]:
    """Twenty random things of the split that all become the same one, in this order."""
    tasks = []
    for seed in seeds:
        places = random.Random(2000 + seed).sample(plan.things, len(plan.things))
        anchor, *rest = places
        gone = [t for t in rest if t.category != anchor.category and anchor.name not in t.relatives]
        counts = Counts(target=2, synonym=1, relative=1, others=40, scenes=0)
        task = plan.of_things(f"20 to {anchor.name}", gone[:20], [seed], counts)
        concepts = tuple(Concept(c.target, anchor=anchor.name) for c in task.concepts)
        tasks.append(dataclasses.replace(task, concepts=concepts))
    return tasks


def styles(plan: Plan, seeds: Sequence[int]) -> list[Task]:
    return [plan.of_style(style.name, seeds) for style in plan.styles]


def characters(plan: Plan, seeds: Sequence[int]) -> list[Task]:
    return [plan.of_things(t.name, [t], seeds) for t in plan.things if t.kind == "character"]


def unsafe(plan: Plan, seeds: Sequence[int]) -> list[Task]:
    return [plan.of_category("weapon", "weapon", seeds)]


def withheld(plan: Plan, seeds: Sequence[int]) -> list[Task]:
    return [
        plan.of_things(name, [plan.table.thing(name)], seeds, withhold=True) for name in CIFAR10
    ]


def lengthy(plan: Plan, seeds: Sequence[int]) -> list[Task]:
    """Each object by its name, judged on long prompts."""
    return [
        plan.of_things(name, [plan.table.thing(name)], seeds, Counts(scenes=0), lengthy=True)
        for name in CIFAR10
    ]


def tuning(plan: Plan, seeds: Sequence[int]) -> list[Task]:
    """Words that are not judged: things, a character and the styles."""
    things = [plan.table.thing(name) for name in ("cow", "rabbit", "sailboat", "snake", "robot")]
    found = [plan.of_things(t.name, [t], seeds) for t in things]
    return found + [plan.of_style(style.name, seeds) for style in plan.styles]


def tuning_several(plan: Plan, seeds: Sequence[int]) -> list[Task]:
    """Words that are not judged, 5 and 10 at once."""
    tasks = []
    for count in (5, 10):
        gone = random.Random(count).sample(plan.things, count)
        tasks.append(plan.of_things(f"{count}", gone, seeds, Counts(2, 1, 1, others=40)))
    return tasks


def taken_apart(plan: Plan, seeds: Sequence[int]) -> list[Task]:
    """Things with many kinds and with few."""
    names = ("automobile", "bird", "cat", "ship")
    return [plan.of_things(name, [plan.table.thing(name)], seeds) for name in names]


def ablated(plan: Plan, seeds: Sequence[int]) -> list[Task]:
    return [
        plan.of_things(name, [plan.table.thing(name)], seeds) for name in ("cat", "ship", "truck")
    ]


@dataclass(frozen=True)
class Table:
    """What is erased and by whom."""

    tasks: Callable[[Plan, Sequence[int]], list[Task]]
    methods: Callable[[], dict[str, Method]] | None
    """Who erases; `None`: who is in every table, by the number of concepts."""
    split: str = "judged"
    out: str = "quality.jsonl"

    def methods_for(self, count: int) -> dict[str, Method]:
        """Who erases tasks of so many concepts."""
        return methods.compared(count) if self.methods is None else self.methods()


def _all() -> dict[str, Method]:
    return methods.variants() | methods.run_time() | methods.baselines()


TABLES: Mapping[str, Table] = {
    "objects": Table(objects, _all),
    "several": Table(several, None),
    "sequential": Table(sequential, methods.in_turn),
    "styles": Table(styles, None),
    "characters": Table(characters, None),
    "unsafe": Table(unsafe, methods.by_category),
    "withheld": Table(withheld, methods.variants),
    "long": Table(lengthy, None),
    "parts": Table(taken_apart, methods.parts),
    "ablation": Table(ablated, methods.ablation),
    "sweep": Table(tuning, methods.sweep, "tuning", "sweep.jsonl"),
    "sweep_several": Table(tuning_several, methods.sweep, "tuning", "sweep.jsonl"),
}
