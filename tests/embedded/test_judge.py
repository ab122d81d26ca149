"""The embedded judge: what it sees in renderings, several things, styles and junk."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from embedded.bank import render
from embedded.drawing import Scene
from embedded.judge import things_of
from embedded.junk import junk
from PIL import Image

from realera_fast.embedded import load_judge, words
from realera_fast.embedded.judge import JUNK, NOTHING, Judge, Sight

try:
    from embedded.drawing import find_font

    find_font()
    HAS_FONT = True
except (FileNotFoundError, OSError):
    HAS_FONT = False

needs_font = pytest.mark.skipif(not HAS_FONT, reason="Noto Color Emoji is not installed")


@pytest.fixture(scope="module")
def judge() -> Judge:
    return load_judge()


def number(name: str) -> int:
    return [thing.name for thing in words().things].index(name)


def as_images(pictures: np.ndarray) -> list[Image.Image]:
    return [Image.fromarray(picture) for picture in pictures]


@needs_font
def test_scenes_and_styles_are_told_apart(judge: Judge) -> None:
    cat, ship = number("cat"), number("ship")
    shown = [Scene((cat,), 0), Scene((cat, ship), 0), Scene((ship,), 1), Scene((ship,), 0, None)]
    sights = judge.look(as_images(render(shown, seed=7, first=0)))
    assert [set(s.things) for s in sights] == [{"cat"}, {"cat", "ship"}, {"ship"}, {"ship"}]
    assert [s.style for s in sights] == ["color", "color", "ink", "color"]
    assert not any(s.junk for s in sights)
    assert sights[0].name == "cat"
    # Larger images and tensors are the same to it.
    large = [i.resize((256, 256)) for i in as_images(render(shown[:1], seed=7, first=0))]
    assert judge.classify(large) == (["cat"], ["color"])


@needs_font
def test_junk_is_called_junk(judge: Judge) -> None:
    shown = [Scene((t,), 0) for t in range(0, 300, 5)]
    x = torch.from_numpy(render(shown, seed=8, first=0)).permute(0, 3, 1, 2).float() / 255
    spoilt = junk(x * 2 - 1, np.random.default_rng(0)).add(1).div(2).clamp(0, 1)
    assert np.mean([sight.junk for sight in judge.look(spoilt)]) > 0.8
    assert np.mean([sight.junk for sight in judge.look(x)]) < 0.05


def test_an_empty_image_shows_nothing(judge: Judge) -> None:
    assert judge.look([]) == []
    assert judge.classify([]) == ([], [])
    plain = Image.new("RGB", (64, 64), (220, 230, 240))
    assert judge.look([plain])[0].things == ()


def test_names_of_sights() -> None:
    assert Sight(("cat", "dog"), "ink", junk=False).name == "cat"
    assert Sight(("cat",), "ink", junk=True).name == JUNK
    assert Sight((), "ink", junk=False).name == NOTHING


def test_wrong_images_are_refused(judge: Judge) -> None:
    with pytest.raises(ValueError, match=r"pictures must be \[b, 3, 64, 64\], not \(1, 3, 8, 8\)"):
        judge.look(torch.zeros(1, 3, 8, 8))


def test_targets_of_training() -> None:
    target = things_of([Scene((1, 3), 0), Scene((2,), 0)])
    assert target.nonzero().tolist() == [[0, 1], [0, 3], [1, 2]]
    assert target.shape == (2, len(words().things) + 1)
