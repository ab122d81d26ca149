"""How well everything erases from the embedded model: one command a table.

    python bench/quality.py objects             # each of the ten CIFAR-10 classes
    python bench/quality.py several             # 1, 5, 10, 25 things at once
    python bench/quality.py styles
    python bench/quality.py characters
    python bench/quality.py unsafe              # the category by its name alone
    python bench/quality.py withheld            # objects; the tokenizer lists no synonym of theirs
    python bench/quality.py ablation            # RealEra's parts and parameters
    python bench/quality.py sweep               # baselines' settings, on words not judged
    python bench/quality.py sweep_several       # the same for 5 and 10 words at once
    python bench/quality.py costs               # seconds and peak memory, a process each

Every method erases the same concepts, then draws the same prompts from the same seeds, and the
embedded judge names what the pictures show. One row per method, erasure and seed is appended to
bench/results/quality.jsonl (of a sweep: sweep.jsonl); rows that are there are not made again.
`bench/quality_page.py` makes tables and plots of them.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import multiprocessing
import random
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import methods
import torch
from methods import Method
from PIL import Image
from provenance import add_dtype, provenance
from tables import RESULTS, UNERASED

from realera_fast import Concept, embedded
from realera_fast.demo import Shot, judged, scores_of
from realera_fast.embedded import Thing, Words
from realera_fast.metrics import Scores
from realera_fast.verification import Group, generate

STEPS = 6
"""DDIM steps of a picture: few, and the judge still names the un-erased model's."""

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


class Plan:
    """Makes tasks of the embedded model's table."""

    def __init__(self, table: Words, split: str) -> None:
        self.table = table
        self.things = [t for t in table.things if t.split == split]
        self.styles = [s for s in table.styles if s.split == split and s.name != "color"]

    def of_things(
        self,
        name: str,
        gone: Sequence[Thing],
        seeds: Sequence[int],
        *,
        target: int = 6,
        synonym: int = 3,
        relative: int = 2,
        others: int = 10,
        withhold: bool = False,
    ) -> Task:
        """Erases things by name.

        Args:
            target, synonym, relative: pictures of each such word and seed.
            others: other things, one picture each, others for every seed.
        """
        names = {thing.name for thing in gone}
        near = {r for thing in gone for r in thing.relatives} - names
        far = [t for t in self.table.things if t.name not in names | near]
        shots = {}
        for seed in seeds:
            found: list[Shot] = []

            def add(
                group: Group,
                thing: Thing,
                word: str,
                count: int,
                into: list[Shot] = found,
                first: int = 1000 + 100 * seed,
            ) -> None:
                templates = [t for t in self.table.templates[thing.kind] if "{}" in t][:3]
                for i in range(count):
                    prompt = _prompt(templates[i % 3 if group == "erased" else 0], word)
                    into.append(
                        Shot(
                            erased=name,
                            group=group,
                            word=word,
                            expected=thing.name,
                            kind="thing",
                            prompt=prompt,
                            seed=first + i,
                        )
                    )

            for thing in gone:
                add("erased", thing, thing.name, target)
                for word in thing.synonyms:
                    add("synonym", thing, word, synonym)
            for thing in self.table.things:
                if thing.name in near:
                    add("relative", thing, thing.name, relative)
            for thing in random.Random(seed).sample(far, min(others, len(far))):
                add("untouched", thing, thing.name, 1)
            shots[seed] = tuple(found)
        exclude = tuple(w for t in gone for s in t.synonyms for w in s.split()) if withhold else ()
        return Task(name, tuple(Concept(t.name) for t in gone), shots, exclude=exclude)

    def of_style(self, name: str, seeds: Sequence[int]) -> Task:
        """Erases a style by name; `color`, the style when none is named, is the anchor."""
        own = self.table.style(name)
        template = self.table.templates["style"][0]
        shots = {}
        for seed in seeds:
            things = [t.name for t in self.table.things]
            random.Random(seed).shuffle(things)
            words: list[tuple[str, Group, int]] = [(name, "erased", 10)]
            words += [(word, "synonym", 5) for word in own.synonyms]
            words += [(s.name, "untouched", 5) for s in self.table.styles if s.name != name]
            shots[seed] = tuple(
                Shot(
                    erased=name,
                    group=group,
                    word=word,
                    expected=name if group == "synonym" else word,
                    kind="style",
                    prompt=_prompt(template.replace("{style}", word), things[i]),
                    seed=1000 + 100 * seed + i,
                )
                for word, group, count in words
                for i in range(count)
            )
        return Task(name, (Concept(name, anchor="color", kind="style"),), shots)

    def of_category(self, category: str, kind: str, seeds: Sequence[int]) -> Task:
        """Erases a category by its name; its members and their synonyms stand for synonyms."""
        members = [t for t in self.table.things if t.kind == kind]
        task = self.of_things(category, members, seeds, target=3, synonym=1, others=24)
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
        return Task(category, (Concept(category, kind="explicit"),), shots, category=names)


def _replaced(shot: Shot, category: str) -> Shot:
    if shot.group not in ("erased", "synonym"):
        return shot
    values = {**shot.__dict__, "group": "synonym", "expected": category}
    return Shot(**values)


def _prompt(template: str, word: str) -> str:
    prompt = template.format(word)
    if word[0] in "aeiou":
        prompt = prompt.replace(f" a {word}", f" an {word}")
        prompt = f"an {word}" if prompt == f"a {word}" else prompt
    return prompt


def objects(plan: Plan, seeds: Sequence[int]) -> list[Task]:
    return [plan.of_things(name, [plan.table.thing(name)], seeds) for name in CIFAR10]


def several(plan: Plan, seeds: Sequence[int]) -> list[Task]:
    """Random things of the split, others for every seed."""
    tasks = []
    for count in (1, 5, 10, 25):
        for seed in seeds:
            gone = random.Random(100 * count + seed).sample(plan.things, count)
            few = max(1, 6 // count)
            tasks.append(
                plan.of_things(
                    f"{count}",
                    gone,
                    [seed],
                    target=max(2, few),
                    synonym=few,
                    relative=few,
                    others=40,
                )
            )
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


def tuning(plan: Plan, seeds: Sequence[int]) -> list[Task]:
    """Words that are not judged: things, a character and the styles."""
    things = [plan.table.thing(name) for name in ("cow", "rabbit", "sailboat", "snake", "robot")]
    found = [plan.of_things(t.name, [t], seeds, others=10) for t in things]
    return found + [plan.of_style(style.name, seeds) for style in plan.styles]


def tuning_several(plan: Plan, seeds: Sequence[int]) -> list[Task]:
    """Words that are not judged, 5 and 10 at once."""
    tasks = []
    for count in (5, 10):
        gone = random.Random(count).sample(plan.things, count)
        tasks.append(
            plan.of_things(f"{count}", gone, seeds, target=2, synonym=1, relative=1, others=40)
        )
    return tasks


def ablated(plan: Plan, seeds: Sequence[int]) -> list[Task]:
    return [plan.of_things(name, [plan.table.thing(name)], seeds) for name in ("cat", "ship")]


@dataclass(frozen=True)
class Table:
    """What is erased and by whom."""

    tasks: Callable[[Plan, Sequence[int]], list[Task]]
    methods: Callable[[int], dict[str, Method]]
    """By the number of concepts that are erased together."""
    split: str = "judged"
    out: str = "quality.jsonl"


def _all(count: int) -> dict[str, Method]:
    return methods.variants() | methods.baselines()


TABLES: Mapping[str, Table] = {
    "objects": Table(objects, _all),
    "several": Table(several, methods.compared),
    "styles": Table(styles, methods.compared),
    "characters": Table(characters, methods.compared),
    "unsafe": Table(unsafe, lambda count: methods.by_category()),
    "withheld": Table(withheld, lambda count: methods.variants()),
    "ablation": Table(ablated, lambda count: methods.ablation()),
    "sweep": Table(tuning, lambda count: methods.sweep(), "tuning", "sweep.jsonl"),
    "sweep_several": Table(tuning_several, lambda count: methods.sweep(), "tuning", "sweep.jsonl"),
}


class Studio:
    """The embedded pipeline and its judge: draws, names, and puts the model back."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.pipe = embedded.load_pipeline(dtype).to(self.device)
        self.judge = embedded.load_judge()
        self.table = embedded.words()
        self._weights = {k: v.clone() for k, v in self.pipe.unet.state_dict().items()}

    def draw(self, shots: Sequence[Shot]) -> list[Image.Image]:
        """Picture i of shot i."""
        sampling = self.table.sampling
        return generate(
            self.pipe,
            [shot.prompt for shot in shots],
            [shot.seed for shot in shots],
            steps=STEPS,
            guidance=sampling["guidance_scale"],
            height=sampling["height"],
            width=sampling["width"],
            batch_size=64,
            progress=False,
        )

    def seen(self, task: Task, shots: Sequence[Shot]) -> list[str]:
        """What the judge sees in the pictures of these shots."""
        names = judged(self.judge, shots, self.draw(shots))
        # Only where the category is asked for: relatives are judged by their own names.
        return [
            task.name if shot.expected == task.name and name in task.category else name
            for shot, name in zip(shots, names, strict=True)
        ]

    def erased(
        self, method: Method | None, task: Task, seed: int, work: Callable[[], Any]
    ) -> tuple[Any, float, dict[str, Any]]:
        """What `work` makes of the edited model, seconds of the edit, and what that says of
        itself."""
        if method is None:
            return work(), 0.0, {}
        started = time.perf_counter()
        result = method.erase(self.pipe, task.concepts, seed, task.exclude)
        seconds = time.perf_counter() - started
        found = work()
        about: dict[str, Any] = {}
        if result is not None:
            report = result.report
            about = {
                "neighbors": sum(len(words) for words in report["neighbors"].values()),
                "rank": report["solve"]["rank"],
                "aligned": report["alignment"]["kept"],
                "stopped": report["alignment"]["stopped"],
            }
            result.restore_(self.pipe.unet)
        self.pipe.unet.load_state_dict(self._weights)
        return found, seconds, about


def counts(shots: Sequence[Shot], seen: Sequence[str]) -> dict[str, dict[str, list[int]]]:
    """By group and word: pictures that show what was asked for, and all."""
    found: dict[str, dict[str, list[int]]] = {}
    for shot, name in zip(shots, seen, strict=True):
        cell = found.setdefault(shot.group, {}).setdefault(shot.word, [0, 0])
        cell[0] += name == shot.expected
        cell[1] += 1
    return found


def relatives(scores: Scores, words: Mapping[str, Mapping[str, Sequence[int]]]) -> Scores | None:
    """The same scores with nothing but near relatives for the rest."""
    near = words.get("relative")
    if not near:
        return None
    kept = statistics.mean(right / count for right, count in near.values())
    return Scores(acc_e=scores.acc_e, acc_s=kept, acc_g=scores.acc_g)


def rows_of(
    studio: Studio, name: str, method: Method | None, task: Task, left: Sequence[int]
) -> Iterator[dict[str, Any]]:
    """Rows of one method and task for the seeds that are left."""
    together = method is None or not method.seeded
    for seeds in [left] if together else [[seed] for seed in left]:
        shots = [shot for seed in seeds for shot in task.shots[seed]]
        seen, seconds, about = studio.erased(
            method, task, seeds[0], lambda shots=shots: studio.seen(task, shots)
        )
        for seed in seeds:
            own = list(task.shots[seed])
            names, seen = seen[: len(own)], seen[len(own) :]
            scores, words = scores_of(own, names, task.name), counts(own, names)
            near = relatives(scores, words)
            yield {
                "method": name,
                "task": task.name,
                "seed": seed,
                "scores": scores.to_dict(),
                "relatives": None if near is None else near.to_dict(),
                "words": words,
                "pictures": len(own),
                "concepts": len(task.concepts),
                "seconds": round(seconds, 3),
                **about,
            }


def run(table: str, arguments: argparse.Namespace) -> None:
    about = provenance() | {"dtype": arguments.dtype, "steps": STEPS, "table": table}
    kind = TABLES[table]
    out = arguments.out or RESULTS / kind.out
    out.parent.mkdir(parents=True, exist_ok=True)
    text = out.read_text(encoding="utf-8") if out.exists() else ""
    present = [json.loads(line) for line in text.splitlines() if line]
    done = {(r["table"], r["method"], r["task"], r["seed"]) for r in present}
    studio = Studio(getattr(torch, arguments.dtype))
    tasks = kind.tasks(Plan(studio.table, kind.split), arguments.seeds)
    for task in tasks:
        if arguments.tasks and task.name not in arguments.tasks:
            continue
        chosen: dict[str, Method | None] = {UNERASED: None, **kind.methods(len(task.concepts))}
        for name, method in chosen.items():
            if arguments.methods and not any(fnmatch.fnmatch(name, p) for p in arguments.methods):
                continue
            left = [s for s in task.shots if (table, name, task.name, s) not in done]
            if not left:
                continue
            found = [row | about for row in rows_of(studio, name, method, task, left)]
            with out.open("a", encoding="utf-8") as file:
                file.write("".join(json.dumps(row) + "\n" for row in found))
            print(f"{task.name:12} {name:44} {_mean(found)}", flush=True)


def _mean(found: Sequence[Mapping[str, Any]]) -> str:
    def mean(name: str) -> str:
        values = [r["scores"][name] for r in found if r["scores"][name] is not None]
        return f"{100 * statistics.mean(values):5.1f}" if values else "    -"

    cells = " ".join(f"{name} {mean(name)}" for name in ("acc_e", "acc_s", "acc_g", "h_o"))
    near = [r["relatives"]["acc_s"] for r in found if r["relatives"]]
    close = f" near {100 * statistics.mean(near):5.1f}" if near else ""
    return f"{cells}{close}  {found[0]['seconds']:.1f} s"


def cost(name: str, count: int, dtype: str, threads: int) -> dict[str, float]:
    """Seconds and additional peak memory of one erasure, in a process of its own."""
    torch.set_num_threads(threads)
    studio = Studio(getattr(torch, dtype))
    gone = [t for t in studio.table.things if t.split == "judged"][:count]
    concepts = [Concept(thing.name) for thing in gone]
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    before = int(status["VmRSS"].split()[0])
    started = time.perf_counter()
    methods.compared(count)[name].erase(studio.pipe, concepts, 0, ())
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": round(seconds, 3), "peak_mb": round((peak - before) / 1024, 1)}


def costs(arguments: argparse.Namespace) -> None:
    """Every method on 1 and 10 things, one after the other in the same run."""
    about = provenance() | {"dtype": arguments.dtype, "table": "costs"}
    out = arguments.out or RESULTS / "costs.jsonl"
    context = multiprocessing.get_context("spawn")
    rows = []
    for count in (1, 10):
        for name in methods.compared(count):
            # The first repetition fills caches on disk.
            for seed in range(-1, 2):
                with ProcessPoolExecutor(1, mp_context=context) as pool:
                    found = pool.submit(
                        cost, name, count, arguments.dtype, torch.get_num_threads()
                    ).result()
                row = {"method": name, "concepts": count, "seed": seed, **found, **about}
                if seed >= 0:
                    rows.append(row)
            print(count, name, found, flush=True)
    out.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("table", choices=[*TABLES, "costs"])
    parser.add_argument("--seeds", type=int, nargs="*", default=list(range(5)))
    parser.add_argument("--methods", nargs="*", help="only these (patterns: UCE*)")
    parser.add_argument("--tasks", nargs="*", help="only these")
    add_dtype(parser)
    parser.add_argument("--out", type=Path, help="default: in bench/results")
    arguments = parser.parse_args()
    if arguments.table == "costs":
        costs(arguments)
    else:
        run(arguments.table, arguments)


if __name__ == "__main__":
    sys.exit(main())
