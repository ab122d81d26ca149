"""What the demo found, and the pages that show it.

``before_after.png`` and ``report.html`` are for people, ``report.json`` holds all numbers, and
``erasure.safetensors`` is what was applied.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from realera_fast.cli.demo_plan import DemoConfig, listed_words, scene_thing, shown_things
from realera_fast.embedded import with_article
from realera_fast.erasure import Erasure, report
from realera_fast.evaluation import (
    Group,
    Row,
    ScoreLine,
    Shot,
    Table,
    before_after_grid,
    is_right,
    picture_warnings,
    scores_of,
    write_html,
)
from realera_fast.runtime import write_atomically
from realera_fast.text import Concept

FILES = ("before_after.png", "report.html", "report.json", "erasure.safetensors", "erasure.md")
"""What the demo writes."""


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


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """Every shot before and after the erasure, and what a judge saw in it."""

    config: DemoConfig
    """What was erased and how many images judge it."""

    table: Any
    """The embedded model's words."""

    shots: tuple[Shot, ...]
    """`[n]` what was sampled."""

    before: tuple[Image.Image, ...]
    """`[n]` images of the original model."""

    after: tuple[Image.Image, ...]
    """`[n]` images of the edited model."""

    seen_before: tuple[str, ...]
    """`[n]` what the judge saw in `before`."""

    seen_after: tuple[str, ...]
    """`[n]` what the judge saw in `after`."""

    concepts: tuple[Concept, Concept]
    """The object and the style, as the eraser got them."""

    held_out: tuple[str, ...]
    """Words that measure generality; no concept names one."""

    erasure: Erasure
    """What was applied between before and after."""

    settings: Mapping[str, Any]
    """What it takes to sample the same images again."""

    @property
    def title(self) -> str:
        """What was erased, for headings."""
        return f"{self.config.thing} and the style {self.config.style}"

    @property
    def guide(self) -> str:
        """What a reader should look at in the images."""
        thing, style = self.config.thing, self.config.style
        named = with_article(thing, self.table.thing(thing).article)
        beside = scene_thing(self.table, self.config)
        scene = f" Of the two things in the scene the {beside.name} stays." if beside else ""
        return (
            f"What to look at: on the right no image may show {named}, by whatever word it was "
            f"asked for, and none the style {style}, while the thing in that style stays. Near "
            f"relatives and everything below them look as on the left.{scene} Below each image is "
            "what the judge sees."
        )

    @property
    def provenance(self) -> dict[str, Any]:
        """What it takes to do the same again."""
        return {
            **self.erasure.provenance,
            "sampling": self.settings,
            "erase_config": self.erasure.config,
        }

    def mined(self) -> set[str]:
        """Every word that mining found and erased as a target's own."""
        neighbors = self.erasure.report.get("neighbors", {}).values()
        return {word for words in neighbors for word in words}

    def held_out_mined(self) -> tuple[str, ...]:
        """The held-out words among them."""
        mined = self.mined()
        return tuple(word for word in self.held_out if word in mined)

    def scores(self) -> tuple[ScoreLine, ...]:
        """The object's and the style's, before and after."""
        return tuple(
            ScoreLine(
                name=f"{word} ({kind})",
                before=scores_of(self.shots, self.seen_before, word),
                after=scores_of(self.shots, self.seen_after, word),
            )
            for word, kind in ((self.config.thing, "object"), (self.config.style, "style"))
        )

    def rows(self) -> tuple[Row, ...]:
        """Rows of the grid: the first seeds of the words worth showing."""
        rows = []
        for erased, word in self._shown_words():
            chosen = [i for i, s in enumerate(self.shots) if (s.erased, s.word) == (erased, word)]
            chosen = chosen[: self.config.columns]
            first = self.shots[chosen[0]]
            styled = f"a ... in the style of {word}"
            rows.append(
                Row(
                    group=first.group,
                    prompt=styled if first.kind == "style" else first.prompt,
                    seeds=tuple(self.shots[i].seed for i in chosen),
                    before=tuple(self.before[i] for i in chosen),
                    after=tuple(self.after[i] for i in chosen),
                    seen_before=tuple(self.seen_before[i] for i in chosen),
                    seen_after=tuple(self.seen_after[i] for i in chosen),
                )
            )
        return tuple(rows)

    def _shown_words(self) -> list[tuple[str, str]]:
        """What the grid shows: the erased concept and the word, as in `Shot`."""
        table, config = self.table, self.config
        target, style = table.thing(config.thing), table.style(config.style)
        others = [s.name for s in table.styles if s.name not in (style.name, config.style_anchor)]
        beside = scene_thing(table, config)
        things = [target.name, *target.said[:1], *table.counted(target)[:2]]
        things += [thing.name for thing in shown_things(table, config)]
        things += [f"{target.name} and {beside.name}"] if beside else []
        styles = [style.name, *table.held_out(style)[:1], *others[:1]]
        return [(target.name, word) for word in things] + [(style.name, word) for word in styles]

    def by_word(self) -> list[dict[str, Any]]:
        """One record per judged word: pictures, accuracy before and after, fractions; whether it
        was mined, and whether it is another word that stood in captions."""
        mined = self.mined()
        thing, style = self.config.thing, self.config.style
        said = {*self.table.thing(thing).said, *self.table.style(style).said}
        numbers: dict[tuple[str, str], list[int]] = {}
        for i, shot in enumerate(self.shots):
            numbers.setdefault((shot.erased, shot.word), []).append(i)
        records = []
        for (erased, word), chosen in numbers.items():
            records.append(
                {
                    "erased": erased,
                    "group": self.shots[chosen[0]].group,
                    "word": word,
                    "pictures": len(chosen),
                    "before": self._accuracy(chosen, self.seen_before),
                    "after": self._accuracy(chosen, self.seen_after),
                    "mined": word in mined,
                    "said": word in said,
                }
            )
        return records

    def _accuracy(self, chosen: Sequence[int], seen: Sequence[str]) -> float:
        return sum(is_right(self.shots[i], seen[i]) for i in chosen) / len(chosen)

    def warnings(self) -> tuple[str, ...]:
        """The erasure's and the images'."""
        found = self.held_out_mined()
        note = (_mined_note(found, self.held_out),) if found else ()
        told = self.erasure.report.get("warnings", ())
        return (*note, *told, *picture_warnings(self.rows()))


def write_images(evidence: Evidence, folder: Path) -> None:
    """Writes the grid and the delta."""
    before_after_grid(
        evidence.rows(),
        folder / FILES[0],
        title=f"Erased from the embedded model: {evidence.title}",
        note=evidence.guide,
    )
    evidence.erasure.save(folder / FILES[3])


def write_report(evidence: Evidence, folder: Path, seconds: Mapping[str, float]) -> DemoResult:
    """Writes the page and the numbers.

    Args:
        seconds: wall-clock seconds by part of the job.
    """
    scores, warnings, by_word = evidence.scores(), evidence.warnings(), evidence.by_word()
    erasure, mined = evidence.erasure, evidence.held_out_mined()
    write_html(
        folder / FILES[1],
        title=f"Erased: {evidence.title}",
        summary=_summary(evidence),
        scores=scores,
        rows=evidence.rows(),
        warnings=warnings,
        tables=_tables(by_word, seconds),
        report=erasure.report,
        provenance=evidence.provenance,
    )
    report = {
        "scores": {
            line.name: {"before": line.before.to_dict(), "after": line.after.to_dict()}
            for line in scores
        },
        "words": by_word,
        "held_out": list(evidence.held_out),
        "held_out_mined": list(mined),
        "warnings": list(warnings),
        "seconds": seconds,
        "erasure": dict(erasure.report),
        "provenance": evidence.provenance,
    }
    write_atomically(folder / FILES[2], (json.dumps(report, indent=1, default=str) + "\n").encode())
    return DemoResult(
        folder=folder,
        scores=scores,
        erasure=erasure,
        seconds=seconds,
        warnings=warnings,
        held_out=evidence.held_out,
        mined=mined,
    )


def _summary(evidence: Evidence) -> str:
    """The page's first paragraph."""
    thing, style = evidence.concepts
    became = report.anchor_name(thing, report.anchors_of(evidence.erasure.report))
    count, found = len(evidence.held_out), len(evidence.held_out_mined())
    mined = (
        f"mining found {found} of these {count} by itself and erased them as targets (see the "
        "warning)."
    )
    return (
        f"From the embedded model, in one call: the object {thing.target!r} became "
        f"{became}, the style {style.target!r} became {style.anchor!r}. "
        f"{len(evidence.shots)} pictures were drawn before and as many after, from the same "
        "seeds, and named by a classifier trained on real renderings. No concept named the "
        f"held-out {listed_words(evidence.held_out)}; "
        + (mined if found else "mining found none of them.")
        + f" {evidence.guide}"
    )


def _tables(by_word: Sequence[Mapping[str, Any]], seconds: Mapping[str, float]) -> list[Table]:
    """The page's tables after the images."""
    return [
        _word_table("Near relatives", "relative", by_word, "Must stay recognizable."),
        _word_table(
            "Held-out words",
            "synonym",
            by_word,
            "Named by no concept. Words that were said stood in the captions that the model was "
            "trained on, unsaid ones in none. Mined words were found by the eraser itself and "
            "erased as targets: they don't measure generality.",
        ),
        _word_table("Everything else", "untouched", by_word, "The 20 that lost the most."),
        Table(title="Seconds", header=("part", "seconds"), rows=tuple(seconds.items())),
    ]


def _word_table(title: str, group: Group, by_word: Sequence[Mapping[str, Any]], note: str) -> Table:
    records = [record for record in by_word if record["group"] == group]
    if group == "untouched":
        records = sorted(records, key=lambda r: (r["after"] - r["before"], r["after"]))[:20]
    held_out = group == "synonym"
    return Table(
        title=title,
        note=note,
        header=(
            *("word", "erased", "pictures", "before, %", "after, %", "mined"),
            *(("in captions",) if held_out else ()),
        ),
        rows=tuple(
            (
                record["word"],
                record["erased"],
                record["pictures"],
                round(100 * record["before"], 1),
                round(100 * record["after"], 1),
                "yes" if record["mined"] else "no",
                *(("said" if record["said"] else "unsaid",) if held_out else ()),
            )
            for record in records
        ),
    )


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
