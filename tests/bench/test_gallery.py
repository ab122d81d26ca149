"""The gallery: its page is the generator's, its pictures are there and small, and it draws."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from edits import CLOSED
from PIL import Image
from publish import gallery
from tiny_models import tiny_pipeline

from realera_fast.evaluation import Sampling

LARGEST = 400_000
"""Bytes of all pictures together."""


def test_the_page_is_what_the_command_writes() -> None:
    assert gallery.PAGE.read_text(encoding="utf-8") == gallery.page()
    kinds = {"thing", "character", "style", "category", "several", "strict"}
    assert set(gallery.EXHIBITS) == kinds
    files = {path.stem: path for path in gallery.FOLDER.iterdir()}
    assert set(files) == kinds
    assert sum(path.stat().st_size for path in files.values()) < LARGEST
    for path in files.values():
        with Image.open(path) as image:
            assert image.format == "JPEG" and image.width > 4 * gallery.TILE


def test_synonyms_are_not_named() -> None:
    for exhibit in gallery.EXHIBITS.values():
        for concept in exhibit.concepts:
            names = [concept] if isinstance(concept, str) else concept.words
            for prompt in exhibit.prompts.get("synonym", ()):
                assert not any(name in prompt.split() for name in names), prompt


def test_it_draws_and_takes_back(tmp_path: Path) -> None:
    pipe = tiny_pipeline()
    before = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    exhibit = replace(
        gallery.EXHIBITS["thing"],
        config=CLOSED,
        prompts={"erased": ("a cat",), "synonym": ("a kitten",), "untouched": ("a dog",)},
    )
    sampling = {**Sampling(steps=1, height=16, width=16).__dict__}
    gallery.draw(exhibit, pipe, tmp_path / "new" / "thing.jpg", sampling)
    with Image.open(tmp_path / "new" / "thing.jpg") as image:
        # Three groups of one row, and two seeds on each side.
        assert image.height > 3 * gallery.TILE and image.width > 4 * gallery.TILE
    assert all(torch.equal(value, before[n]) for n, value in pipe.unet.state_dict().items())


def test_names_of_exhibits_are_checked(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gallery.main(["portrait"])
    assert "no such exhibit: portrait; expected some of thing" in capsys.readouterr().err
