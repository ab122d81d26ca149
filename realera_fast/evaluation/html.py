"""One self-contained HTML page about one erasure: scores, images, report, provenance.

The page holds everything inside (styles, images as base64), asks nothing of a network, has no
script, and follows the reader's light or dark setting. Every string is escaped: concepts and
prompts are a user's words, and a delta file's report is anybody's.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from realera_fast.evaluation.grid import encoded
from realera_fast.evaluation.images import GROUPS, Row, is_plain
from realera_fast.evaluation.metrics import Scores
from realera_fast.runtime import write_atomically

LARGEST = 256
"""Longest side, in pixels, of an image inside a page; larger ones are scaled down."""

SHOWN_WARNINGS = 6
"""Warnings shown before the rest is folded."""


@dataclass(frozen=True, kw_only=True)
class ScoreLine:
    """The scores of one concept before and after."""

    name: str
    """The concept, and what it is compared with if that is not obvious."""

    before: Scores
    """Of the original model."""

    after: Scores
    """Of the edited model."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table of the page."""

    title: str
    """Heading."""

    header: tuple[str, ...]
    """`[columns]` names of the columns."""

    rows: tuple[tuple[Any, ...], ...]
    """`[rows, columns]` strings and numbers."""

    note: str = ""
    """A sentence under the heading."""


_TITLES: Mapping[str, tuple[str, str]] = {
    "words": (
        "How far each word moved",
        "moved: the fraction of the way that words went which should go (1 is all of it). "
        "drift: the distance moved, in distances between words, for words that should stay.",
    ),
    "neighbors": ("Mined neighbors", "Words that nobody named and that were erased as well."),
    "relatives": ("Near relatives", "Other kinds of the same thing, which stay."),
    "beyond": ("Just outside", "The nearest words outside the neighborhood, which stay."),
    "borderline": ("In doubt", "Words outside by little: name them as synonyms if they should go."),
    "sources": (
        "Why a neighbor is one",
        "inflection: another form of a name; lexicon: a synonym or a kind by WordNet; token: a "
        "word that the model sees alike; member: of a category, as the model draws it; drawn: in "
        "doubt, and drawn alike.",
    ),
    "line": (
        "How near is near",
        "Least cosines of neighbors in this model, and shares of the lexicon's pairs above them.",
    ),
    "anchors": ("Anchors that nobody named", "What concepts became, and why."),
    "scales": ("Scales", "What was chosen, and what every choice would have done."),
    "solve": ("The least-squares solve", ""),
    "layers": (
        "Change by layer",
        "Norm of the change of each projection, relative to the projection.",
    ),
    "alignment": ("Noise alignment", ""),
    "seconds": ("Seconds by stage", ""),
}
"""Headings and explanations of the parts of an erasure's report."""

_FIRST = ("", "word", "role", "anchor", "moved", "drift")
"""Columns of records in the order of reading; others follow as they come."""

_BACKGROUND = ("neighbor", "vocabulary")
"""Roles of words that the user did not name."""


def write_html(
    path: str | Path,
    *,
    title: str,
    summary: str = "",
    scores: Sequence[ScoreLine] = (),
    rows: Sequence[Row] = (),
    warnings: Iterable[str] = (),
    tables: Sequence[Table] = (),
    report: Mapping[str, Any] | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> None:
    """Writes the page, atomically.

    Args:
        path: The file to write.
        title: Heading of the page.
        summary: A paragraph under it.
        scores: Lines of the table of scores.
        rows: Images before and after.
        warnings: Sentences that a reader must not overlook; shown first.
        tables: Further tables, after the images.
        report: The `Erasure`'s report, or any other mapping of plain values.
        provenance: What it takes to do the same again: versions, seeds, sampler, hashes, config.
    """
    parts = [f"<h1>{escape(title)}</h1>"]
    if summary:
        parts.append(f'<p class="lead">{escape(summary)}</p>')
    warnings = list(warnings)
    if warnings:
        items = [f"<li>{escape(warning)}</li>" for warning in warnings]
        more = "".join(items[SHOWN_WARNINGS:])
        if more:
            count = len(items) - SHOWN_WARNINGS
            more = (
                f'<details><summary>{count} more</summary><ul class="plain">{more}</ul></details>'
            )
        shown = "".join(items[:SHOWN_WARNINGS])
        parts.append(f'<aside><h2>Warnings</h2><ul class="plain">{shown}</ul>{more}</aside>')
    if scores:
        parts.append(_scores(scores))
    if rows:
        parts.append(_images(rows))
    parts += [_table(table) for table in tables]
    if report:
        parts.append("<h2>What the erasure did to the model</h2>")
        # A saved report comes back with its keys sorted; the page has an order of its own.
        known = {key: report[key] for key in _TITLES if key in report}
        rest = {k: v for k, v in report.items() if k not in known and k != "warnings"}
        parts += [_value(key, value) for key, value in (*known.items(), *_scalars_first(rest))]
    if provenance:
        parts.append("<h2>How to get the same again</h2>")
        parts += [_value(key, value) for key, value in _scalars_first(provenance)]
    page = _PAGE.format(title=escape(title), style=_STYLE, body="\n".join(parts))
    write_atomically(path, page.encode())


def numbers(rows: Sequence[Row]) -> Table:
    """What was measured of each prompt, beside its images."""
    scores = list(dict.fromkeys(name for row in rows for name in row.scores))
    detectors = list(dict.fromkeys(name for row in rows for name in row.detected))
    header = ["prompt", "", "pixels, %", "text, %"]
    header += [f"{name} {side}" for name in scores for side in ("before", "after")]
    header += [f"{name} {side}" for name in detectors for side in ("before", "after")]
    lines = []
    for row in rows:
        text = None if row.text_change is None else round(100 * row.text_change, 2)
        line: list[Any] = [row.prompt, GROUPS[row.group], round(100 * row.change, 2), text]
        for name in scores:
            line += [round(value, 2) for value in row.scores.get(name, (math.nan, math.nan))]
        for name in detectors:
            sides = row.detected.get(name, ((), ()))
            line += [" | ".join(each or "–" for each in said) for said in sides]
        lines.append(tuple(line))
    return Table(
        title="Numbers",
        header=tuple(header),
        rows=tuple(lines),
        note="pixels: mean difference of the pictures before and after. text: how much of what "
        "enters the model for this prompt changed. clip: 100 times the cosine between picture and "
        "prompt.",
    )


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{style}</style>
</head>
<body><main>
{body}
</main></body>
</html>
"""

_STYLE = """
:root { --paper: #fff; --ink: #1d2430; --faint: #5d6675; --rule: #dde2e9; --band: #f5f7fa;
  --erased: #b3261e; --synonym: #9a6200; --relative: #1e6b52; --untouched: #1f5fa8;
  --warn: #fff4e0; --warn-rule: #e0a43a; --bar: #b9cdea; }
@media (prefers-color-scheme: dark) { :root { --paper: #14181f; --ink: #e4e8ee; --faint: #9aa4b2;
  --rule: #2d3541; --band: #1b212a; --erased: #ff8a80; --synonym: #f2bd62; --relative: #6fd0ab;
  --untouched: #8ab8f5; --warn: #33290f; --warn-rule: #a87b22; --bar: #2f4d78; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", "Noto Sans", "DejaVu Sans", sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 28px 24px 64px; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .3em; }
h2 { font-size: 1.2rem; margin: 2.2em 0 .5em; padding-bottom: .25em;
  border-bottom: 1px solid var(--rule); }
h3 { font-size: 1rem; margin: 1.4em 0 .4em; }
p { margin: .4em 0; max-width: 75ch; }
.lead, .note { color: var(--faint); }
.note { font-size: .9rem; }
aside { background: var(--warn); border-left: 4px solid var(--warn-rule); padding: .6em 1em;
  margin: 1.2em 0; }
aside h2 { border: 0; margin: 0 0 .2em; padding: 0; font-size: 1rem; }
ul.plain { margin: 0; padding-left: 1.2em; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .32em .9em .32em 0; vertical-align: top;
  border-bottom: 1px solid var(--rule); }
th { font-weight: 600; color: var(--faint); }
td.n, th.n { text-align: right; white-space: nowrap; }
td.long { overflow-wrap: anywhere; }
tbody tr:hover { background: var(--band); }
.arrow { color: var(--faint); padding: 0 .3em; }
.bar { display: inline-block; height: .7em; background: var(--bar); border-radius: 2px; }
.pictures td { border: 0; padding: 3px 3px 8px; text-align: center; font-size: .78rem;
  color: var(--faint); }
.pictures td.prompt { text-align: left; vertical-align: middle; font-size: .92rem;
  color: var(--ink); max-width: 240px; min-width: 130px; padding-right: 1.2em; }
.pictures td.between { padding: 0 .7em; }
.pictures th { border: 0; }
.pictures th.side { text-align: center; color: var(--ink); }
.pictures tr.group th { padding-top: 1em; font-size: 1rem; }
.pictures tbody { border-left: 4px solid var(--rule); }
.pictures tbody th, .pictures tbody td.prompt { padding-left: .8em; }
.erased { border-color: var(--erased) !important; } .erased th { color: var(--erased); }
.synonym { border-color: var(--synonym) !important; } .synonym th { color: var(--synonym); }
.relative { border-color: var(--relative) !important; } .relative th { color: var(--relative); }
.untouched { border-color: var(--untouched) !important; }
.untouched th { color: var(--untouched); }
img { display: block; margin: 0 auto 2px; border-radius: 3px; }
code { font: .88em ui-monospace, "DejaVu Sans Mono", monospace; }
details { margin: .6em 0; } summary { cursor: pointer; }
@media print { main { max-width: none; padding: 0; } tr { break-inside: avoid; } }
"""


def _scores(lines: Sequence[ScoreLine]) -> str:
    columns = ("Acc_e", "Acc_s", "Acc_g", "H_o")
    explained = (
        ("Acc_e", "accuracy on the erased concept, lower is better"),
        ("Acc_s", "accuracy on everything else, higher is better"),
        ("Acc_g", "accuracy on synonyms that no concept named, lower is better"),
        ("H_o", "their harmonic mean 3 / (1/(1-Acc_e) + 1/Acc_s + 1/(1-Acc_g)), higher is better"),
    )
    head = "".join(f'<th class="n">{name}</th>' for name in columns)
    body = []
    for line in lines:
        before, after = line.before.percentages(), line.after.percentages()
        cells = "".join(
            f'<td class="n">{_percent(before[name])}<span class="arrow">→</span>'
            f"<b>{_percent(after[name])}</b></td>"
            for name in columns
        )
        body.append(f"<tr><td>{escape(line.name)}</td>{cells}</tr>")
    notes = "; ".join(f"<b>{name}</b> {meaning}" for name, meaning in explained)
    return (
        "<h2>Scores</h2>"
        f'<div class="scroll"><table><thead><tr><th>erased</th>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
        f'<p class="note">Percent, before → after. {notes}.</p>'
    )


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


def _images(rows: Sequence[Row]) -> str:
    columns = max(len(row.seeds) for row in rows)
    parts = [
        "<h2>Before and after, from the same seeds</h2>",
        '<div class="scroll"><table class="pictures"><thead><tr><th></th>',
        f'<th class="side" colspan="{columns}">before</th><th></th>',
        f'<th class="side" colspan="{columns}">after</th></tr></thead>',
    ]
    for group, name in GROUPS.items():
        members = [row for row in rows if row.group == group]
        if not members:
            continue
        parts.append(
            f'<tbody class="{group}"><tr class="group">'
            f'<th colspan="{2 * columns + 2}">{escape(name)}</th></tr>'
        )
        for row in members:
            parts.append(f'<tr><td class="prompt">{escape(row.prompt)}</td>')
            for side, images, seen in (
                ("before", row.before, row.seen_before),
                ("after", row.after, row.seen_after),
            ):
                for i in range(columns):
                    if i >= len(images):
                        parts.append("<td></td>")
                        continue
                    alternative = f"{row.prompt}, {side}, seed {row.seeds[i]}"
                    under = escape(seen[i]) if seen else f"seed {row.seeds[i]}"
                    parts.append(f"<td>{_img(images[i], alternative)}{under}</td>")
                if side == "before":
                    parts.append('<td class="between"></td>')
            parts.append("</tr>")
        parts.append("</tbody>")
    parts.append("</table></div>")
    if any(row.seen_after for row in rows):
        parts.append('<p class="note">Under each picture: what the judge saw in it.</p>')
    return "".join(parts)


def _img(image: Image.Image, alternative: str) -> str:
    image = image.convert("RGB")
    image.thumbnail((LARGEST, LARGEST), Image.Resampling.LANCZOS)
    # Small images stay exact; photographs of real models would make pages of megabytes.
    if max(image.size) <= 128:
        kind, data = "png", encoded(image, "PNG")
    else:
        kind, data = "jpeg", encoded(image, "JPEG", quality=88)
    shown = 96 if max(image.size) <= 96 else 144
    scale = shown / max(image.size)
    size = tuple(round(side * scale) for side in image.size)
    return (
        f'<img width="{size[0]}" height="{size[1]}" alt="{escape(alternative)}" '
        f'src="data:image/{kind};base64,{base64.b64encode(data).decode()}">'
    )


def _table(table: Table) -> str:
    numeric = [
        all(isinstance(row[i], int | float) or row[i] is None for row in table.rows)
        for i in range(len(table.header))
    ]
    head = "".join(
        f'<th class="n">{escape(name)}</th>' if number else f"<th>{escape(name)}</th>"
        for name, number in zip(table.header, numeric, strict=True)
    )
    body = "".join(
        "<tr>"
        + "".join(
            f'<td class="{"n" if number else "long"}">{_text(cell)}</td>'
            for cell, number in zip(row, numeric, strict=True)
        )
        + "</tr>"
        for row in table.rows
    )
    heading = f"<h3>{escape(table.title)}</h3>" if table.title else ""
    note = f'<p class="note">{escape(table.note)}</p>' if table.note else ""
    return (
        f"{heading}{note}"
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _scalars_first(values: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """The entries, with all the single values gathered under one heading at the front."""
    single = {key: value for key, value in values.items() if is_plain(value)}
    others = [(key, value) for key, value in values.items() if key not in single]
    return [("summary", single), *others] if single else others


def _value(key: str, value: Any) -> str:
    """Any plain value under a heading: mappings and lists of mappings become tables."""
    title, note = _TITLES.get(key, (key.replace("_", " ").capitalize(), ""))
    if is_plain(value):
        return _table(Table(title=title, header=("",), rows=((value,),)))
    if not value:
        return f'<h3>{escape(title)}</h3><p class="note">none</p>'
    if isinstance(value, Mapping):
        if all(isinstance(v, Mapping) and v for v in value.values()):
            return _records(title, [{"": name, **entry} for name, entry in value.items()], note)
        numbers = [v for v in value.values() if isinstance(v, float)]
        if len(value) > 3 and len(numbers) == len(value):
            return _bars(title, value, note)
        rows = tuple((str(name).replace("_", " "), _cell(v)) for name, v in value.items())
        return _table(Table(title=title, header=("", ""), rows=rows, note=note))
    entries = list(value)
    if all(isinstance(entry, Mapping) for entry in entries):
        # An erasure measures dozens of words that nobody named: they stay folded.
        named = [entry for entry in entries if entry.get("role") not in _BACKGROUND]
        rest = [entry for entry in entries if entry.get("role") in _BACKGROUND]
        parts = _records(title, named, note) if named else ""
        if rest:
            parts += _records("Mined neighbors and other words", rest, fold=True)
        return parts
    items = "".join(f"<li>{_text(_cell(entry))}</li>" for entry in entries)
    return f'<h3>{escape(title)}</h3><ul class="plain">{items}</ul>'


def _records(
    title: str, records: Sequence[Mapping[str, Any]], note: str = "", *, fold: bool = False
) -> str:
    names = list(dict.fromkeys(name for record in records for name in record))
    names.sort(key=lambda name: _FIRST.index(name) if name in _FIRST else len(_FIRST))
    rows = tuple(tuple(_cell(record.get(name)) for name in names) for record in records)
    header = tuple(str(name).replace("_", " ") for name in names)
    if not fold and len(rows) <= 40:
        return _table(Table(title=title, header=header, rows=rows, note=note))
    table = _table(Table(title="", header=header, rows=rows, note=note))
    return f"<details><summary>{escape(title)} ({len(rows)})</summary>{table}</details>"


def _bars(title: str, values: Mapping[str, float], note: str) -> str:
    """Numbers by name, each with a bar relative to the largest."""
    finite = [abs(value) for value in values.values() if math.isfinite(value)]
    largest = max(finite, default=0.0) or 1.0
    body = []
    for name, value in values.items():
        width = 160 * abs(value) / largest if math.isfinite(value) else 0
        body.append(
            f'<tr><td><code>{escape(str(name))}</code></td><td class="n">{_text(value)}</td>'
            f'<td><span class="bar" style="width:{width:.0f}px"></span></td></tr>'
        )
    return (
        f'<h3>{escape(title)}</h3><p class="note">{escape(note)}</p><div class="scroll"><table>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def _cell(value: Any) -> Any:
    """A value for one cell: nested ones as compact JSON, lists of words joined."""
    if is_plain(value):
        return value
    if isinstance(value, Mapping) and all(is_plain(entry) for entry in value.values()):
        return ", ".join(
            f"{name} {entry:.4g}" if isinstance(entry, float) else f"{name} {entry}"
            for name, entry in value.items()
        )
    if isinstance(value, Sequence) and all(isinstance(entry, str) for entry in value):
        return ", ".join(value) or "none"
    return json.dumps(value, ensure_ascii=False, default=str)


def _text(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    return escape(str(value))
