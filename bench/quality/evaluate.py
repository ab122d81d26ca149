"""How well everything erases from the embedded model: one command a table.

    python bench/run.py quality objects        # each of the ten CIFAR-10 classes
    python bench/run.py quality several        # 1, 10, 50, 100 things at once
    python bench/run.py quality sequential     # 20 things, one after the other, to one anchor
    python bench/run.py quality styles
    python bench/run.py quality characters
    python bench/run.py quality unsafe         # the category by its name alone
    python bench/run.py quality withheld       # objects; the tokenizer lists no synonym of theirs
    python bench/run.py quality long           # objects, judged on long prompts
    python bench/run.py quality parts          # the closed form, a part taken away at a time
    python bench/run.py quality ablation       # RealEra's parts, as published
    python bench/run.py quality sweep          # baselines' settings, on words not judged
    python bench/run.py quality sweep_several  # the same for 5 and 10 words at once
    python bench/run.py quality costs          # seconds and peak memory, a process each
    python bench/run.py quality objects --world FOLDER   # on another exported model

Every method erases the same concepts, then draws the same prompts from the same seeds, and the
embedded judge names what the pictures show. One row per method, erasure and seed is appended to
bench/results/quality.jsonl (of a sweep: sweep.jsonl); rows that are there are not made again unless
the method has other settings now. bench/results/settings.json says which a row's are.
`bench/run.py publish` makes tables and plots of them.
"""

from __future__ import annotations

import argparse
import fnmatch
import functools
import hashlib
import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from harness import RESULTS
from harness.provenance import add_dtype, provenance
from harness.rows import read
from harness.tables import UNERASED

from quality import cost, flow_methods
from quality.methods import Method
from quality.studio import STEPS, Studio
from quality.tasks import TABLES, Plan, Task
from realera_fast.embedded import ACCURACY, Words
from realera_fast.embedded.flow import FLOW
from realera_fast.evaluation import Scores, Shot, is_right, scores_of


def counts(shots: Sequence[Shot], seen: Sequence[str]) -> dict[str, dict[str, list[int]]]:
    """By group and word: pictures that show what was asked for, and all."""
    found: dict[str, dict[str, list[int]]] = {}
    for shot, name in zip(shots, seen, strict=True):
        cell = found.setdefault(shot.group, {}).setdefault(shot.word, [0, 0])
        cell[0] += is_right(shot, name)
        cell[1] += 1
    return found


def relatives(scores: Scores, words: Mapping[str, Mapping[str, Sequence[int]]]) -> Scores | None:
    """The same scores with nothing but near relatives for the rest."""
    near = words.get("relative")
    if not near:
        return None
    kept = statistics.mean(right / count for right, count in near.values())
    return Scores(acc_e=scores.acc_e, acc_s=kept, acc_g=scores.acc_g)


def coherence(table: Words, task: Task, shots: Sequence[Shot], seen: Sequence[str]) -> float | None:
    """Share of pictures of erased names that show something that has a name; of styles, in one of
    which every picture is, None."""
    known = {task.name, *(thing.name for thing in table.things)}
    found = [
        name in known
        for shot, name in zip(shots, seen, strict=True)
        if shot.group == "erased" and shot.kind == "thing"
    ]
    return statistics.mean(found) if found else None


def associated(
    table: Words, words: Mapping[str, Mapping[str, Sequence[int]]]
) -> dict[str, float | None]:
    """Acc_g of the words that stood in captions, and of those that never did."""
    said = {word for entry in (*table.things, *table.styles) for word in entry.said}
    shares: dict[bool, list[float]] = {True: [], False: []}
    for word, (right, count) in words.get("synonym", {}).items():
        shares[word in said].append(right / count)
    return {
        name: statistics.mean(shares[known]) if shares[known] else None
        for name, known in (("said", True), ("unsaid", False))
    }


def share(answers: Sequence[tuple[Shot, str]]) -> float | None:
    """Share of pictures that are right; None of none."""
    marks = [is_right(shot, name) for shot, name in answers]
    return statistics.mean(marks) if marks else None


def is_kind(task: Task, shot: Shot) -> bool:
    """Whether a picture is of a kind of what goes (`Task.kinds`)."""
    return shot.group == "relative" and shot.expected in task.kinds


def rows_of(
    studio: Studio, name: str, method: Method | None, task: Task, left: Sequence[int]
) -> Iterator[dict[str, Any]]:
    """Rows of one method and task for the seeds that are left."""
    together = method is None or not method.seeded
    for seeds in [left] if together else [[seed] for seed in left]:
        shots = [shot for seed in seeds for shot in task.shots[seed]]
        seen, seconds, about = studio.erased(
            method, task, seeds[0], functools.partial(studio.seen, task, shots)
        )
        for seed in seeds:
            every = list(task.shots[seed])
            answers, seen = [*zip(every, seen, strict=False)], seen[len(every) :]
            scenes = [answer for answer in answers if answer[0].kind == "scene"]
            kinds = [answer for answer in answers if is_kind(task, answer[0])]
            judged = [a for a in answers if a[0].kind != "scene" and not is_kind(task, a[0])]
            own, names = [shot for shot, _ in judged], [name for _, name in judged]
            scores, words = scores_of(own, names, task.name), counts(own, names)
            near = relatives(scores, words)
            yield {
                "method": name,
                "task": task.name,
                "seed": seed,
                "scores": scores.to_dict(),
                "relatives": None if near is None else near.to_dict(),
                "associated": associated(studio.table, words),
                "words": words,
                "coherence": coherence(studio.table, task, own, names),
                "scenes": share(scenes),
                "kinds": share(kinds),
                "pictures": len(every),
                "concepts": len(task.concepts),
                "seconds": round(seconds, 3),
                **about,
            }


def run(table: str, arguments: argparse.Namespace) -> None:
    about = provenance() | {"dtype": arguments.dtype, "steps": STEPS, "table": table}
    flow = arguments.denoiser == "transformer"
    parts = [arguments.world.resolve().name] if arguments.world else []
    world = "/".join([*parts, FLOW] if flow else parts)
    if world:
        about["world"] = world
    kind = TABLES[table]
    out = arguments.out or RESULTS / kind.out
    out.parent.mkdir(parents=True, exist_ok=True)
    present = read(out) if out.exists() else []
    present = [row for row in present if row.get("world", "") == world and row["table"] == table]
    made = {(row["method"], row["task"], row["seed"]): row.get("settings") for row in present}
    studio = Studio(getattr(torch, arguments.dtype), arguments.world, arguments.denoiser)
    about["model"] = studio.fingerprint
    if any(row.get("model") != studio.fingerprint for row in present):
        raise SystemExit(
            f"{out}: the table {table!r} has rows of another model, which can't stand beside "
            "this one's; remove them, or name another file with --out"
        )
    tasks = kind.tasks(Plan(studio.table, kind.split), arguments.seeds)
    for task in tasks:
        if arguments.tasks and task.name not in arguments.tasks:
            continue
        count = len(task.concepts)
        methods = flow_methods.methods_for(table, count) if flow else kind.methods_for(count)
        chosen: dict[str, Method | None] = {UNERASED: None, **methods}
        for name, method in chosen.items():
            if arguments.methods and not any(fnmatch.fnmatch(name, p) for p in arguments.methods):
                continue
            of_method = {} if method is None else method.settings
            settings = settings_key(of_method)
            # A row without settings is of a time when none were written down.
            keys = {s: made.get((name, task.name, s), "") for s in task.shots}
            left = [s for s, key in keys.items() if key not in (None, settings)]
            if not left:
                continue
            mark = about | {"settings": settings}
            found = [row | mark for row in rows_of(studio, name, method, task, left)]
            with writing(out.parent):
                note_settings(out.parent / "settings.json", settings, of_method)
                put(out, found, stale=any(keys[seed] for seed in left))
            print(f"{task.name:12} {name:44} {_mean(found)}", flush=True)


def settings_key(settings: Mapping[str, Any]) -> str:
    """Twelve digits of the SHA-256 of a method's settings."""
    text = json.dumps(settings, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def note_settings(path: Path, key: str, settings: Mapping[str, Any]) -> None:
    """Writes down what a row's `settings` stand for."""
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if key not in known:
        lines = sorted((known | {key: settings}).items())
        body = ",\n".join(f"{json.dumps(k)}: {json.dumps(v, default=str)}" for k, v in lines)
        path.write_text(f"{{\n{body}\n}}\n", encoding="utf-8")


KEY = ("world", "table", "method", "task", "seed")
"""What no two rows of a file share."""


def writing(folder: Path) -> FileLock:
    """Held while rows are written: two runs of one table would undo each other's."""
    return FileLock(folder / "rows.lock")


def put(out: Path, found: Sequence[Mapping[str, Any]], *, stale: bool) -> None:
    """Appends rows to a file.

    Args:
        stale: whether the file has rows that these take the place of.
    """
    lines = "".join(json.dumps(row) + "\n" for row in found)
    if not stale:
        with out.open("a", encoding="utf-8") as file:
            file.write(lines)
        return
    new = {tuple(row.get(name) for name in KEY) for row in found}
    kept = [row for row in read(out) if tuple(row.get(name) for name in KEY) not in new]
    whole = out.with_suffix(".unfinished")
    whole.write_text("".join(json.dumps(row) + "\n" for row in kept) + lines, encoding="utf-8")
    whole.replace(out)


def _mean(found: Sequence[Mapping[str, Any]]) -> str:
    def mean(name: str) -> str:
        values = [r["scores"][name] for r in found if r["scores"][name] is not None]
        return f"{100 * statistics.mean(values):5.1f}" if values else "    -"

    cells = " ".join(f"{name} {mean(name)}" for name in ("acc_e", "acc_s", "acc_g", "h_o"))
    near = [r["relatives"]["acc_s"] for r in found if r["relatives"]]
    close = f" near {100 * statistics.mean(near):5.1f}" if near else ""
    return f"{cells}{close}  {found[0]['seconds']:.1f} s"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="run.py quality",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("table", choices=[*TABLES, "costs"])
    parser.add_argument("--seeds", type=int, nargs="*", default=list(range(5)))
    parser.add_argument("--methods", nargs="*", help="only these (patterns: UCE*)")
    parser.add_argument("--tasks", nargs="*", help="only these")
    add_dtype(parser)
    parser.add_argument("--out", type=Path, help="default: in bench/results")
    parser.add_argument(
        "--world", type=Path, metavar="FOLDER", help="of another model (run.py embedded --out)"
    )
    parser.add_argument(
        "--denoiser",
        choices=("unet", "transformer"),
        default="unet",
        help="transformer: the flow-matching sibling",
    )
    arguments = parser.parse_args(argv)
    if arguments.table == "costs" and (arguments.world or arguments.denoiser != "unet"):
        parser.error("costs are those of the shipped model; leave --world and --denoiser out")
    for name in ("words.json", ACCURACY) if arguments.world else ():
        if not (arguments.world / name).is_file():
            parser.error(f"--world {arguments.world}: no {name}; run embedded's export, evaluate")
    if arguments.table == "costs":
        cost.costs(arguments)
    else:
        run(arguments.table, arguments)
    return 0
