"""Images before and after, side by side."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from realera_fast.evaluation.images import GROUPS, Group, Row
from realera_fast.runtime import write_atomically


def before_after_grid(
    rows: Sequence[Row],
    path: str | Path | None = None,
    *,
    title: str = "",
    note: str = "",
    tile: int | None = None,
) -> Image.Image:
    """One image of all rows: prompts on the left, before and after in columns by seed.

    Args:
        rows: what to show; rows of one group stand together under its heading, in the order of
            `GROUPS`.
        path: where to write a PNG, atomically; None only returns the image.
        title: line above everything.
        note: what to look at, below the title; wrapped to the width.
        tile: side of one image in pixels; None shows small images at a whole multiple of their
            size, to 128 pixels, and large ones scaled down to 192.

    Returns:
        The grid.
    """
    if not rows:
        raise ValueError("rows is empty: there is nothing to show")
    columns = max(len(row.seeds) for row in rows)
    size = rows[0].before[0].size
    if tile is None:
        longest = max(size)
        tile = 192 if longest > 192 else longest * max(1, 128 // longest)
    scale = tile / max(size)
    cell = (max(1, round(size[0] * scale)), max(1, round(size[1] * scale)))

    heading, text, small = (ImageFont.load_default(points) for points in (17, 15, 12))
    measure = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    label_width = 40 + max(
        measure.textlength(line, text) for row in rows for line in _wrapped(row.prompt, 26)
    )
    label_width = int(max(label_width, 150))
    gap, margin, middle = 6, 22, 30
    judged = any(row.seen_before or row.seen_after for row in rows)
    row_height = cell[1] + gap + (16 if judged else 0)
    half = columns * (cell[0] + gap) - gap
    left = (margin + label_width, margin + label_width + half + middle)
    groups = [(g, [row for row in rows if row.group == g]) for g in GROUPS]
    groups = [(g, members) for g, members in groups if members]
    total_width = left[1] + half + margin
    if title:
        total_width = max(total_width, int(measure.textlength(title, heading)) + 2 * margin)
    letters = (
        (total_width - 2 * margin) / (measure.textlength(note, text) / len(note)) if note else 1
    )
    told = textwrap.wrap(note, int(letters))
    top = margin + (34 if title else 0) + 20 * len(told) + (10 if told else 0)
    body = top + 50
    band = 34
    total_height = body + sum(band + len(members) * row_height for _, members in groups) + margin

    page = Image.new("RGB", (total_width, total_height), _PAPER)
    draw = ImageDraw.Draw(page)
    if title:
        draw.text((margin, margin), title, _INK, heading)
    for i, line in enumerate(told):
        draw.text((margin, margin + (34 if title else 0) + 20 * i), line, _INK, text)
    for x, name in zip(left, ("before", "after"), strict=True):
        draw.text((x + half / 2, top + 10), name, _INK, heading, anchor="mm")
        draw.line((x, top + 24, x + half, top + 24), _RULE)
    if len({row.seeds for row in rows}) == 1:
        for x in left:
            for i, seed in enumerate(rows[0].seeds):
                at = (x + i * (cell[0] + gap) + cell[0] / 2, top + 36)
                draw.text(at, f"seed {seed}", _FAINT, small, anchor="mm")
    y = body
    for group, members in groups:
        color = _COLORS[group]
        draw.text((margin + 14, y + band / 2 + 2), GROUPS[group], color, heading, anchor="lm")
        bottom = y + band + len(members) * row_height - gap
        draw.rectangle((margin, y + 8, margin + 4, bottom), color)
        y += band
        for row in members:
            lines = _wrapped(row.prompt, 26)
            for i, line in enumerate(lines):
                offset = (i - (len(lines) - 1) / 2) * 19
                draw.text((margin + 14, y + cell[1] / 2 + offset), line, _INK, text, anchor="lm")
            for x, images, seen in (
                (left[0], row.before, row.seen_before),
                (left[1], row.after, row.seen_after),
            ):
                for i, image in enumerate(images):
                    at = (x + i * (cell[0] + gap), y)
                    page.paste(image.convert("RGB").resize(cell, Image.Resampling.LANCZOS), at)
                    if seen:
                        name_at = (at[0] + cell[0] / 2, y + cell[1] + 8)
                        draw.text(name_at, seen[i], _FAINT, small, anchor="mm")
            y += row_height
    if path is not None:
        write_atomically(path, encoded(page, "PNG"))
    return page


def encoded(image: Image.Image, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


_PAPER, _INK, _FAINT, _RULE = "#ffffff", "#1d2430", "#6b7482", "#cfd5dd"
_COLORS: Mapping[Group, str] = {
    "erased": "#b3261e",
    "synonym": "#9a6200",
    "relative": "#1e6b52",
    "untouched": "#1f5fa8",
}


def _wrapped(text: str, width: int) -> list[str]:
    """At most three lines; what does not fit ends in an ellipsis."""
    lines = textwrap.wrap(text, width) or ["(empty prompt)"]
    return lines if len(lines) <= 3 else [*lines[:2], lines[2][: width - 1] + "…"]
