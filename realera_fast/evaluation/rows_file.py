"""Images as files and a table of them, for tools that score folders.

`case_number`, `prompt`, `evaluation_seed` and `evaluation_guidance` are the columns that the prompt
files of ESD, UCE and MACE have, and images are named by them, ``{case_number}_0.png``: what reads
those tables and folders reads these.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from realera_fast.erasure import Erasure
from realera_fast.evaluation.images import Row
from realera_fast.evaluation.prompt_groups import names_in
from realera_fast.evaluation.verification import Verification
from realera_fast.runtime import write_atomically

COLUMNS = (
    "case_number",
    "prompt",
    "evaluation_seed",
    "evaluation_guidance",
    "concept",
    "group",
    "file",
    "pixel_change",
)
"""Those of every table; scores and detectors follow."""


def write_rows(folder: str | Path, found: Verification, erasure: Erasure) -> None:
    """Writes the images of a verification as ``before/*.png`` and ``after/*.png``, and
    ``rows.csv``: one line for each prompt and seed.

    `file` is the name of the image in both folders. `concept` is the target that a prompt is about;
    it is empty for untouched prompts. What a judge saw, scores and what detectors found are columns
    ``NAME_before`` and ``NAME_after``.

    Args:
        folder: where to write; made if it is not there.
        found: what `verify` returned.
        erasure: what it compared.
    """
    folder = Path(folder)
    lines: list[dict[str, Any]] = []
    for side in ("before", "after"):
        (folder / side).mkdir(parents=True, exist_ok=True)
    for row in found.rows:
        concept = concept_of(row, erasure)
        for i, seed in enumerate(row.seeds):
            name = f"{len(lines)}_0.png"
            row.before[i].save(folder / "before" / name)
            row.after[i].save(folder / "after" / name)
            lines.append(
                {
                    "case_number": len(lines),
                    "prompt": row.prompt,
                    "evaluation_seed": seed,
                    "evaluation_guidance": found.settings["guidance_scale"],
                    "concept": concept,
                    "group": row.group,
                    "file": name,
                    "pixel_change": round(row.changes[i], 6),
                    **dict(_evaluated(row, i)),
                }
            )
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, _columns(lines), restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    write_atomically(folder / "rows.csv", text.getvalue().encode())


def concept_of(row: Row, erasure: Erasure) -> str:
    """The target whose name, synonym or near relative a prompt holds; "" for untouched ones."""
    if row.group == "untouched":
        return ""
    if row.group == "relative":
        kept: Mapping[str, Sequence[str]] = erasure.report.get("relatives", {})
        beyond: Mapping[str, Sequence[str]] = erasure.report.get("beyond", {})
        near = {**beyond, **{t: [*w, *beyond.get(t, ())] for t, w in kept.items()}}
        return next((target for target, words in near.items() if row.prompt in words), "")
    named = names_in(row.prompt, erasure.concepts)
    return named[0].target if named else ""


def _evaluated(row: Row, place: int) -> Iterator[tuple[str, Any]]:
    """Columns of one image that evaluators filled."""
    for side, seen in (("before", row.seen_before), ("after", row.seen_after)):
        if seen:
            yield f"seen_{side}", seen[place]
    for values in (row.picture_scores, row.detected):
        for name, sides in values.items():
            for side, each in zip(("before", "after"), sides, strict=True):
                yield f"{name}_{side}", each[place]


def _columns(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys([*COLUMNS, *(name for line in lines for name in line)]))
