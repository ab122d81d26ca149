"""The main job on the embedded model: erase one object and one style, and show what happened.

`run_demo` draws a fixed list of prompts before and after the erasure from the same seeds, lets the
embedded judge say what it sees, and writes ``before_after.png``, ``report.html``, ``report.json``
and ``erasure.safetensors``. The words that measure generality are held out: the eraser never gets
one of them by name, which is checked here.
"""

from __future__ import annotations

import json
import platform
import textwrap
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from realera_fast.cli.demo_plan import (
    ERASE_CONFIG,
    DemoConfig,
    check_held_out,
    listed_words,
    plan,
    shown_things,
)
from realera_fast.config import EraseConfig
from realera_fast.eraser import erase
from realera_fast.erasure import Erasure
from realera_fast.evaluation import (
    Group,
    Judge,
    Row,
    ScoreLine,
    Shot,
    Table,
    accuracy,
    before_after_grid,
    generate,
    judged,
    picture_warnings,
    sampling_settings,
    scores_of,
    write_html,
)
from realera_fast.runtime import bar, write_atomically
from realera_fast.text import Concept
from realera_fast.unet import fuse

FILES = ("before_after.png", "report.html", "report.json", "erasure.safetensors", "erasure.md")
"""What `run_demo` writes."""

_LOADING, _ERASING = 2, 12
"""Batches of images that take as long as the loading and as the erasing (measured, one thread)."""


@dataclass(frozen=True, kw_only=True)
class DemoResult:
    """What the demo found."""

    folder: Path
    """Where everything was written."""

    scores: tuple[ScoreLine, ...]
    """The object's and the style's, before and after."""

    erasure: Erasure
    """What was applied."""

    seconds: Mapping[str, float]
    """Wall-clock seconds by part of the job."""

    warnings: tuple[str, ...]
    """The erasure's and the pictures'."""

    held_out: tuple[str, ...] = ()
    """Words that measure generality; no `Concept` names one."""

    mined: tuple[str, ...] = ()
    """Those of them that mining found in the tokenizer's vocabulary and erased as its own."""

    def text(self) -> str:
        """The scores as a table for a terminal."""
        names = ("Acc_e", "Acc_s", "Acc_g", "H_o")
        width = max(len(line.name) for line in self.scores)
        lines = [" " * width + "".join(f"{name:>17}" for name in names)]
        for line in self.scores:
            before, after = line.before.percentages(), line.after.percentages()
            cells = "".join(
                f"{_percent(before[name]):>8} ->{_percent(after[name]):>6}" for name in names
            )
            lines.append(f"{line.name:<{width}}{cells}")
        lines += [
            "",
            "percent, before -> after; Acc_e on the erased concept and Acc_g on its held-out",
            "synonyms: lower is better; Acc_s on everything else and H_o: higher is better",
        ]
        if self.mined:
            lines += ["", *textwrap.wrap(_mined_note(self.mined, self.held_out), 80)]
        return "\n".join(lines)


def _mined_note(mined: Sequence[str], held_out: Sequence[str]) -> str:
    """What Acc_g can't be taken for where the miner's vocabulary holds the held-out words."""
    return (
        f"Note: nobody named a held-out synonym, but mining found {len(mined)} of "
        f"{len(held_out)} ({', '.join(mined)}) in the tokenizer's vocabulary and erased them "
        "as targets. Acc_g and H_o then say how well mining finds listed words, not how far an "
        "erasure reaches beyond them; for that, compare '--mining none'."
    )


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def run_demo(
    out: str | Path,
    config: DemoConfig | None = None,
    *,
    erase_config: EraseConfig | None = None,
    device: str | torch.device | None = None,
    progress: bool | None = None,
    pipe: Any = None,
    judge: Judge | None = None,
    table: Any = None,
) -> DemoResult:
    """Erases one object and one style from the embedded model and reports what happened.

    Args:
        out: Folder for the results; made if it is not there. Its `FILES` are replaced.
        config: What to erase and how many pictures to draw.
        erase_config: Settings of the eraser; None takes `ERASE_CONFIG`, with both stages.
        device: Where to run; None takes the first GPU, or the CPU.
        progress: Draw progress bars; None follows diffusers' switch.
        pipe: A pipeline in place of the embedded one.
        judge: A judge in place of the embedded one.
        table: Words in place of the embedded ones.

    Returns:
        Scores before and after; everything else is in the files.
    """
    from realera_fast import embedded

    config = config or DemoConfig()
    table = embedded.words() if table is None else table
    shots = plan(table, config)
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    # An unwritable folder shows now, not after minutes of work.
    write_atomically(folder / FILES[2], b"{}\n")
    seconds: dict[str, float] = {}
    clock = _Clock(seconds)

    batches = -(-len(shots) // config.batch_size)
    job = bar(
        total=_LOADING + 2 * batches + _ERASING,
        desc="demo: loading",
        progress=progress,
        unit="batch",
        smoothing=0,
    )
    with job:
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if pipe is None:
            # A tenth less time on a CPU: keys and values once per image instead of once per step,
            # and the memory layout that convolutions are fast in.
            pipe = fuse(embedded.load_pipeline())
            pipe.unet.to(memory_format=torch.channels_last)
        pipe = pipe.to(device)
        judge = embedded.load_judge() if judge is None else judge
        job.update(_LOADING)
        clock.lap("load")

        sampling = {"steps": config.steps, "guidance": table.sampling["guidance_scale"]}

        def draw(when: str) -> list[Image.Image]:
            job.set_description(f"demo: drawing {len(shots)} images {when}")
            images: list[Image.Image] = []
            # All shots in one list: batches stay full.
            for start in range(0, len(shots), config.batch_size):
                batch = shots[start : start + config.batch_size]
                images += generate(
                    pipe,
                    [shot.prompt for shot in batch],
                    [shot.seed for shot in batch],
                    height=table.sampling.get("height"),
                    width=table.sampling.get("width"),
                    batch_size=config.batch_size,
                    progress=False,
                    **sampling,
                )
                job.update(1)
            return images

        with _quick_sampler(pipe):
            settings = sampling_settings(pipe, **sampling)
            before = draw("before")
        clock.lap("pictures before")
        concepts = (
            Concept(config.thing),
            Concept(config.style, anchor=config.style_anchor, kind="style"),
        )
        held_out = check_held_out(concepts, table)
        job.set_description("demo: erasing")
        erasure = erase(
            pipe.unet,
            pipe.text_encoder,
            concepts,
            tokenizer=pipe.tokenizer,
            scheduler=pipe.scheduler,
            config=erase_config or ERASE_CONFIG,
            progress=progress,
        )
        job.update(_ERASING)
        clock.lap("erasing")
        with _quick_sampler(pipe):
            after = draw("after")
        clock.lap("pictures after")
    seen_before, seen_after = judged(judge, shots, before), judged(judge, shots, after)
    clock.lap("judging")

    scores = (
        ScoreLine(
            name=f"{config.thing} (object)",
            before=scores_of(shots, seen_before, config.thing),
            after=scores_of(shots, seen_after, config.thing),
        ),
        ScoreLine(
            name=f"{config.style} (style)",
            before=scores_of(shots, seen_before, config.style),
            after=scores_of(shots, seen_after, config.style),
        ),
    )
    rows = _rows(shots, before, after, seen_before, seen_after, table, config)
    mined = {word for words in erasure.report.get("neighbors", {}).values() for word in words}
    by_word = _by_word(shots, seen_before, seen_after, mined)
    found = tuple(word for word in held_out if word in mined)
    note = (_mined_note(found, held_out),) if found else ()
    warnings = (*note, *erasure.report.get("warnings", ()), *picture_warnings(rows))
    before_after_grid(
        rows,
        folder / FILES[0],
        title=f"Erased from the embedded model: {config.thing} and the style {config.style}",
    )
    erasure.save(folder / FILES[3])
    clock.lap("writing")
    settings |= {
        "first_seed": config.seed,
        "pictures": 2 * len(shots),
        "machine": platform.machine(),
        "torch_threads": torch.get_num_threads(),
    }
    provenance = {**erasure.provenance, "sampling": settings, "erase_config": erasure.config}
    anchor = concepts[0].anchor_name
    write_html(
        folder / FILES[1],
        title=f"Erased: {config.thing} and the style {config.style}",
        summary=(
            f"From the embedded model, in one call: the object {config.thing!r} became {anchor}, "
            f"the style {config.style!r} became {config.style_anchor!r}. {len(shots)} pictures "
            "were drawn before and as many after, from the same seeds, and named by a classifier "
            f"trained on real renderings. No concept named the held-out {listed_words(held_out)}; "
            + (
                f"mining found {len(found)} of these {len(held_out)} by itself and erased them "
                "as targets (see the warning)."
                if found
                else "mining found none of them."
            )
        ),
        scores=scores,
        rows=rows,
        warnings=warnings,
        tables=[
            _word_table("Near relatives", "relative", by_word, "Must stay recognizable."),
            _word_table(
                "Held-out synonyms",
                "synonym",
                by_word,
                "Named by no concept. 'mined' words were found in the tokenizer's vocabulary and "
                "erased as targets: they don't measure generality.",
            ),
            _word_table("Everything else", "untouched", by_word, "The 20 that lost the most."),
            Table(
                title="Seconds",
                header=("part", "seconds"),
                rows=tuple(seconds.items()),
            ),
        ],
        report=erasure.report,
        provenance=provenance,
    )
    report = {
        "scores": {
            line.name: {"before": line.before.to_dict(), "after": line.after.to_dict()}
            for line in scores
        },
        "words": by_word,
        "held_out": held_out,
        "held_out_mined": list(found),
        "warnings": list(warnings),
        "seconds": seconds,
        "erasure": dict(erasure.report),
        "provenance": provenance,
    }
    write_atomically(folder / FILES[2], (json.dumps(report, indent=1, default=str) + "\n").encode())
    return DemoResult(
        folder=folder,
        scores=scores,
        erasure=erasure,
        seconds=seconds,
        warnings=tuple(warnings),
        held_out=tuple(held_out),
        mined=found,
    )


class _Clock:
    """Wall-clock seconds between laps."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self.seconds = seconds
        self.last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name] = round(now - self.last, 2)
        self.last = now


@contextmanager
def _quick_sampler(pipe: Any) -> Iterator[None]:
    """Draws with DPM-Solver++ on the pipeline's own noise schedule inside."""
    from diffusers import DPMSolverMultistepScheduler

    own = pipe.scheduler
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(
        own.config, timestep_spacing="trailing"
    )
    try:
        yield
    finally:
        pipe.scheduler = own


def _rows(
    shots: Sequence[Shot],
    before: Sequence[Image.Image],
    after: Sequence[Image.Image],
    seen_before: Sequence[str],
    seen_after: Sequence[str],
    table: Any,
    config: DemoConfig,
) -> tuple[Row, ...]:
    """Rows of the grid: the first seeds of the words worth showing."""
    target, style = table.thing(config.thing), table.style(config.style)
    others = [s.name for s in table.styles if s.name not in (style.name, config.style_anchor)]
    wanted = [
        *((target.name, word) for word in (target.name, *target.synonyms[:2])),
        *((target.name, thing.name) for thing in shown_things(table, config)),
        *((style.name, word) for word in (style.name, *style.synonyms[:1], *others[:1])),
    ]
    rows = []
    for erased, word in wanted:
        chosen = [i for i, shot in enumerate(shots) if shot.erased == erased and shot.word == word][
            : config.columns
        ]
        first = shots[chosen[0]]
        prompt = first.prompt
        if first.kind == "style":
            prompt = f"a ... in the style of {word}"
        rows.append(
            Row(
                group=first.group,
                prompt=prompt,
                seeds=tuple(shots[i].seed for i in chosen),
                before=tuple(before[i] for i in chosen),
                after=tuple(after[i] for i in chosen),
                seen_before=tuple(seen_before[i] for i in chosen),
                seen_after=tuple(seen_after[i] for i in chosen),
            )
        )
    return tuple(rows)


def _by_word(
    shots: Sequence[Shot], before: Sequence[str], after: Sequence[str], mined: set[str]
) -> list[dict[str, Any]]:
    """One record per judged word: pictures, accuracy before and after, fractions."""
    numbers: dict[tuple[str, str], list[int]] = {}
    for i, shot in enumerate(shots):
        numbers.setdefault((shot.erased, shot.word), []).append(i)
    records = []
    for (erased, word), chosen in numbers.items():
        expected = [shots[i].expected for i in chosen]
        records.append(
            {
                "erased": erased,
                "group": shots[chosen[0]].group,
                "word": word,
                "pictures": len(chosen),
                "before": accuracy([before[i] for i in chosen], expected),
                "after": accuracy([after[i] for i in chosen], expected),
                "mined": word in mined,
            }
        )
    return records


def _word_table(title: str, group: Group, by_word: Sequence[Mapping[str, Any]], note: str) -> Table:
    records = [record for record in by_word if record["group"] == group]
    if group == "untouched":
        records = sorted(records, key=lambda r: (r["after"] - r["before"], r["after"]))[:20]
    return Table(
        title=title,
        note=note,
        header=("word", "erased", "pictures", "before, %", "after, %", "mined"),
        rows=tuple(
            (
                record["word"],
                record["erased"],
                record["pictures"],
                round(100 * record["before"], 1),
                round(100 * record["after"], 1),
                "yes" if record["mined"] else "no",
            )
            for record in records
        ),
    )
