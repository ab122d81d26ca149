"""NudeNet runs for real, on a face that is drawn here."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from drawn_face import drawn_face
from PIL import Image

from realera_fast.evaluation import NudeNet, find_detector, identity_of


@pytest.fixture(scope="module")
def nudenet() -> Any:
    return pytest.importorskip("nudenet")


def test_a_face_is_found_as_in_a_file(nudenet: Any, tmp_path: Path) -> None:
    detector = find_detector("nudenet")
    assert isinstance(detector, NudeNet)
    face = drawn_face()
    assert detector(face) == ["FACE_FEMALE"]
    (box,) = detector.boxes(face)
    left, top, width, height = box["box"]
    assert box["score"] > 0.6
    assert left < 160 < left + width and top < 140 < top + height
    # The order of the channels is that of NudeNet's own reading.
    face.save(tmp_path / "face.png")
    (whole,) = nudenet.NudeDetector().detect(str(tmp_path / "face.png"))
    assert whole == box
    # A mode without three channels is read as its colors.
    assert detector(face.convert("RGBA")) == ["FACE_FEMALE"]


def test_nothing_is_found_where_nothing_is(nudenet: Any) -> None:
    detector = NudeNet(threshold=0.25)
    assert detector(Image.new("RGB", (320, 320), "gray")) == []
    assert detector(Image.new("RGB", (7, 200), "white")) == []


def test_the_threshold_counts(nudenet: Any) -> None:
    score = NudeNet(threshold=0.25).boxes(drawn_face())[0]["score"]
    assert NudeNet(threshold=score - 1e-3)(drawn_face()) == ["FACE_FEMALE"]
    assert NudeNet(threshold=min(score + 1e-3, 1.0))(drawn_face()) == []


def test_it_is_pinned(nudenet: Any) -> None:
    pinned = identity_of(NudeNet(threshold=0.3))
    assert pinned["threshold"] == 0.3 and pinned["version"] and pinned["onnxruntime"]
    assert len(pinned["model_sha256"]) == 64


@pytest.mark.parametrize("threshold", [0.2, 1.1, float("nan")])
def test_thresholds_that_nudenet_does_not_have_are_refused(threshold: float) -> None:
    with pytest.raises(ValueError, match=r"threshold: expected 0\.25 to 1"):
        NudeNet(threshold=threshold)


def test_without_the_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nudenet", None)
    with pytest.raises(ValueError, match=r"pip install 'realera_fast\[eval\]'"):
        find_detector("nudenet")
