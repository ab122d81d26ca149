"""What the judge sees in the pictures of the trained model."""

from __future__ import annotations

import datetime
import json
import multiprocessing
import random
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import RESULTS, ROOT
from harness.provenance import default_dtype
from torch import Tensor

from embedded.common import log
from embedded.export import FOLDERS, exported_record
from realera_fast.embedded import ACCURACY, FOLDER, Words, load_judge, load_pipeline, words
from realera_fast.embedded.flow import flow_words, load_flow
from realera_fast.embedded.judge import Judge, Sight
from realera_fast.runtime import write_atomically

SAMPLERS = {"unet": "DDIM", "transformer": "Euler (flow matching)"}
REPORTS = {"unet": "embedded_model.json", "transformer": "embedded_flow.json"}


@dataclass(frozen=True)
class Budget:
    """Pictures that are drawn."""

    seeds: Mapping[str, int]
    """Of each word, by its kind."""
    scenes: int
    per_style: int
    per_style_word: int


BUDGETS = {
    "unet": Budget(dict(name=5, said=3, unsaid=5), 500, 50, 10),
    "transformer": Budget(dict(name=2, said=1, unsaid=2), 60, 48, 2),
}
FIRST_SEED = 9000
SHEETS = ROOT / "docs" / "results" / "embedded"
"""Contact sheets, for people."""
BATCH = 32
SWEPT = (*((12, guidance) for guidance in (2.0, 3.0, 4.0, 5.5)), (6, 4.0), (20, 4.0))
"""Steps and guidance scales that are compared."""


@dataclass(frozen=True)
class Wish:
    """A prompt, the word that it tries, and the things and the style that are asked for."""

    prompt: str
    word: str
    things: tuple[str, ...]
    style: str = "color"


@dataclass(frozen=True)
class Tried:
    """Wishes, the pictures that the model made of them, and what the judge saw."""

    wishes: list[Wish]
    images: Tensor
    sights: list[Sight]

    def marks(self) -> list[bool]:
        """Whether just the wished things are seen, and no junk."""
        return [
            set(sight.things) == set(wish.things) and not sight.junk
            for wish, sight in zip(self.wishes, self.sights, strict=True)
        ]

    def style_marks(self) -> list[bool]:
        """Whether the wished style is seen."""
        return [g.style == w.style for w, g in zip(self.wishes, self.sights, strict=True)]

    def by_word(self, marks: list[bool]) -> dict[str, float]:
        """The share of the marks of every word."""
        found: dict[str, list[bool]] = {}
        for wish, mark in zip(self.wishes, marks, strict=True):
            found.setdefault(wish.word, []).append(mark)
        return {word: round(sum(m) / len(m), 3) for word, m in found.items()}


@dataclass(frozen=True)
class Model:
    """An exported model, its judge, and the processes that draw."""

    folder: Path
    denoiser: str
    judge: Judge
    pool: Executor

    @property
    def table(self) -> Words:
        """The table, with the sampling and the accuracy of this denoiser."""
        return words(self.folder) if self.denoiser == "unet" else flow_words(self.folder)


@cache
def _pipeline(folder: Path, denoiser: str):
    """The pipeline of a process that draws, on one thread."""
    torch.set_num_threads(1)
    load = load_pipeline if denoiser == "unet" else load_flow
    return load(getattr(torch, default_dtype()), folder)


def _drawn(
    prompts: list[str], first_seed: int, sampling: dict[str, Any], folder: Path, denoiser: str
) -> np.ndarray:
    """uint8 samples `[n, h, w, 3]`, each from its own seed."""
    seeds = range(first_seed, first_seed + len(prompts))
    named = {"num_inference_steps" if k == "steps" else k: v for k, v in sampling.items()}
    images = _pipeline(folder, denoiser)(
        prompts,
        **named,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        output_type="np",
    ).images
    return (images * 255).round().astype(np.uint8)


def tried(
    model: Model,
    wishes: list[Wish],
    first_seed: int = FIRST_SEED,
    sampling: dict[str, Any] | None = None,
) -> Tried:
    """Pictures of wishes, drawn by all processes of the pool, and what the judge sees in them."""
    sampling = model.table.sampling if sampling is None else sampling
    chunks = [[w.prompt for w in wishes[i : i + BATCH]] for i in range(0, len(wishes), BATCH)]
    seeds = range(first_seed, first_seed + len(wishes), BATCH)
    parts = []
    same = (repeat(sampling), repeat(model.folder), repeat(model.denoiser))
    for part in model.pool.map(_drawn, chunks, seeds, *same):
        parts.append(torch.from_numpy(part).permute(0, 3, 1, 2) / 255)
        if len(parts) % 20 == 0:
            log("evaluate", f"{len(parts)} of {len(chunks)} batches")
    images = torch.cat(parts)
    sights = [sight for chunk in images.split(256) for sight in model.judge.look(chunk)]
    return Tried(wishes, images, sights)


def painters() -> Executor:
    """As many processes as the run has threads."""
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(torch.get_num_threads(), mp_context=context)


def save_grid(images: Tensor, columns: int, path: Path) -> None:
    """Pictures in rows of ``columns``, the last row filled up with white."""
    from PIL import Image

    missing = -len(images) % columns
    images = torch.cat([images, torch.ones(missing, *images.shape[1:])])
    pixels = (images * 255).round().byte().permute(0, 2, 3, 1).numpy()
    rows = [np.concatenate(pixels[i : i + columns], 1) for i in range(0, len(pixels), columns)]
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.concatenate(rows)).save(path, quality=90)


def word_wishes(table: Words, kind: str, seeds: int) -> list[Wish]:
    """A photo of every word of a kind, so many seeds each."""
    return [
        Wish(table.prompts(thing, text)[0], text, (thing.name,))
        for thing in table.things
        for text in ((thing.name,) if kind == "name" else getattr(thing, kind))
        for _ in range(seeds)
    ]


def scene_wishes(table: Words, count: int) -> list[Wish]:
    """Two things that are not of one category, in the plain style."""
    rng = random.Random(FIRST_SEED)
    wishes = []
    while len(wishes) < count:
        a, b = rng.sample(table.things, 2)
        if a.category != b.category:
            wishes.append(Wish(table.scene(a, b), a.name, (a.name, b.name)))
    return wishes


def style_wishes(table: Words, budget: Budget) -> list[Wish]:
    """Every word for every style but the plain one, on things drawn at random."""
    rng = random.Random(FIRST_SEED + 1)
    return [
        Wish(table.styled(word, thing), word, (thing.name,), style.name)
        for style in table.styles[1:]
        for word in (style.name, *style.said, *style.unsaid)
        for thing in rng.sample(
            table.things, budget.per_style if word == style.name else budget.per_style_word
        )
    ]


def share(marks: Sequence[bool]) -> float:
    return round(sum(marks) / len(marks), 4)


def mean(accuracy: Mapping[str, float]) -> float:
    return round(sum(accuracy.values()) / len(accuracy), 4)


def style_report(found: Tried, names: set[str]) -> dict[str, Any]:
    """Accuracy of the styles' names: the style, the thing in it, and each style."""
    named = [wish.word in names for wish in found.wishes]
    by_word = found.by_word(found.style_marks())
    return {
        "pictures": sum(named),
        "style": share([m for m, n in zip(found.style_marks(), named, strict=True) if n]),
        "thing": share([m for m, n in zip(found.marks(), named, strict=True) if n]),
        "per_style": {word: value for word, value in by_word.items() if word in names},
    }


def provenance(work: Path, model: Model) -> dict[str, Any]:
    """What was trained, by what, and how the pictures were sampled."""
    import diffusers
    import transformers

    return {
        "date": f"{datetime.datetime.now():%Y-%m-%d}",
        "versions": {
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "transformers": transformers.__version__,
        },
        "sampling": {"sampler": SAMPLERS[model.denoiser], **model.table.sampling},
        "dtype": default_dtype(),
        "seed": FIRST_SEED,
        "training": json.loads(exported_record(work, model.denoiser).read_text()),
        "judge_held_out": json.loads((work / "judge.json").read_text()),
        "autoencoder_held_out": json.loads((work / "vae.json").read_text()),
    }


def stage_evaluate(work: Path, folder: Path, denoiser: str) -> None:
    """How often the judge sees in the un-erased model's pictures what the prompt asked for."""
    # The pages are of the shipped model; another's report stays with it.
    shipped, flow = folder == FOLDER, denoiser != "unet"
    results, sheets = (RESULTS, SHEETS) if shipped else (folder, folder / "sheets")
    sheets = sheets / FOLDERS[denoiser] if flow else sheets
    budget = BUDGETS[denoiser]
    with painters() as pool:
        model = Model(folder, denoiser, load_judge(folder), pool)
        table = model.table
        found = {
            kind: tried(model, word_wishes(table, kind, seeds))
            for kind, seeds in budget.seeds.items()
        }
        styles = tried(model, style_wishes(table, budget))
        scenes = tried(model, scene_wishes(table, budget.scenes))
    accuracy = {kind: rows.by_word(rows.marks()) for kind, rows in found.items()}
    by_style_word = styles.by_word(styles.style_marks())
    save_grid(found["name"].images[:: budget.seeds["name"]], 16, sheets / "things.jpg")
    save_grid(scenes.images[:64], 16, sheets / "scenes.jpg")
    names = {style.name for style in table.styles}
    named = [i for i, wish in enumerate(styles.wishes) if wish.word in names]
    # A row a style.
    shown = styles.images[named].unflatten(0, (-1, budget.per_style))[:, ::3][:, :16].flatten(0, 1)
    save_grid(shown, 16, sheets / "styles.jpg")
    write_atomically(
        (folder / FOLDERS[denoiser] if flow else folder) / ACCURACY,
        (json.dumps(accuracy | {"style": by_style_word}, indent=0) + "\n").encode(),
    )
    unsaid = accuracy["unsaid"]
    unsaid |= {w: by_style_word[w] for style in table.styles[1:] for w in style.unsaid}
    report = provenance(work, model) | {
        "names": {
            "pictures": len(found["name"].wishes),
            "accuracy": mean(accuracy["name"]),
            "junk": share([sight.junk for sight in found["name"].sights]),
            "style_is_color": share(found["name"].style_marks()),
            "below_0.8": {w: value for w, value in accuracy["name"].items() if value < 0.8},
        },
        "said": {"words": len(accuracy["said"]), "accuracy": mean(accuracy["said"])},
        "unsaid": {
            "tried": len(unsaid),
            "accuracy": mean(unsaid),
            "counted": sum(value >= table.counts_from for value in unsaid.values()),
        },
        "scenes": {"pictures": len(scenes.wishes), "both": share(scenes.marks())},
        "styles": style_report(styles, names),
    }
    write_atomically(results / REPORTS[denoiser], (json.dumps(report, indent=2) + "\n").encode())
    log("evaluate", json.dumps({k: report[k] for k in ("names", "said", "unsaid", "scenes")}))


def stage_sweep(work: Path, folder: Path, denoiser: str) -> None:
    """Compare guidance and step counts on the tuning things; the best is the table's `sampling`."""
    table = words(folder)
    tuning = [thing for thing in table.things if thing.split == "tuning"]
    wishes = [Wish(table.prompts(t)[0], t.name, (t.name,)) for t in tuning * 2]
    with painters() as pool:
        model = Model(folder, denoiser, load_judge(folder), pool)
        for steps, guidance in SWEPT:
            sampling = model.table.sampling | {"steps": steps, "guidance_scale": guidance}
            found = tried(model, wishes, 5000, sampling)
            spoilt = share([sight.junk for sight in found.sights])
            right = share(found.marks())
            log("sweep", f"steps {steps} guidance {guidance}: {right}, junk {spoilt}")
