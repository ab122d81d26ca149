"""Images as files, and the table of them that other tools read."""

from __future__ import annotations

import csv
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from realera_fast import Concept
from realera_fast.evaluation import Row, write_rows


def solid(shade: int) -> Image.Image:
    return Image.new("RGB", (8, 8), (shade,) * 3)


def row(group: str, prompt: str, shades: tuple[int, ...], **fields: Any) -> Row:
    return Row(
        group=group,  # type: ignore[arg-type]
        prompt=prompt,
        seeds=tuple(10 + i for i in range(len(shades))),
        before=tuple(solid(shade) for shade in shades),
        after=tuple(solid(shade + 51) for shade in shades),
        **fields,
    )


@pytest.fixture
def erasure() -> Any:
    concepts = (Concept("cat", synonyms=("kitten",)), Concept("Van Gogh", kind="style"))
    report = {"relatives": {"cat": ["lynx"]}, "beyond": {"cat": ["puma"], "Van Gogh": ["Monet"]}}
    return SimpleNamespace(concepts=concepts, report=report)


def read(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_a_line_for_each_prompt_and_seed(erasure: Any, tmp_path: Path) -> None:
    rows = (
        row(
            "erased",
            'a "cat", asleep\nin the style of Van Gogh',
            (0, 10),
            seen_before=("cat", "cat"),
            seen_after=("ship", "cat"),
            scores={"clip": (25.0, 10.0)},
            picture_scores={"clip": ((20.0, 30.0), (5.0, 15.0))},
            detected={"nudenet": (("FACE_FEMALE, FEET_EXPOSED", ""), ("", ""))},
        ),
        row("synonym", "a kitten", (20,)),
        row("relative", "puma", (30,)),
        row("relative", "Monet", (40,)),
        row("untouched", "a cat that was asked for as untouched", (50,)),
    )
    write_rows(
        tmp_path / "new", SimpleNamespace(rows=rows, settings={"guidance_scale": 7.5}), erasure
    )  # type: ignore[arg-type]
    lines = read(tmp_path / "new" / "rows.csv")
    assert [line["case_number"] for line in lines] == [str(i) for i in range(6)]
    assert [line["evaluation_seed"] for line in lines] == ["10", "11", "10", "10", "10", "10"]
    assert {line["evaluation_guidance"] for line in lines} == {"7.5"}
    assert [line["concept"] for line in lines] == ["cat", "cat", "cat", "cat", "Van Gogh", ""]
    assert lines[0]["prompt"] == rows[0].prompt and lines[2]["group"] == "synonym"
    assert [(x["clip_before"], x["clip_after"]) for x in lines[:2]] == [
        ("20.0", "5.0"),
        ("30.0", "15.0"),
    ]
    assert lines[0]["nudenet_before"] == "FACE_FEMALE, FEET_EXPOSED"
    assert [line["seen_after"] for line in lines[:3]] == ["ship", "cat", ""]
    # The pictures that lines name are the ones that were drawn.
    for line, shade in zip(lines, (0, 10, 20, 30, 40, 50), strict=True):
        for side, shown in (("before", shade), ("after", shade + 51)):
            with Image.open(tmp_path / "new" / side / line["file"]) as image:
                assert image.getpixel((0, 0)) == (shown,) * 3
        assert float(line["pixel_change"]) == pytest.approx(0.2)
    for side in ("before", "after"):
        assert len(list((tmp_path / "new" / side).iterdir())) == 6
