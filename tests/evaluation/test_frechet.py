"""Fréchet distances against their formula, and features of weights that are made here."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_clip import tiny_clip

from realera_fast.evaluation import (
    ClipJudge,
    FrechetReference,
    InceptionFeatures,
    Row,
    pictures_in,
)


def noise(seed: int, low: int = 0, high: int = 256, size: int = 8) -> Image.Image:
    generator = np.random.default_rng(seed)
    return Image.fromarray(generator.integers(low, high, (size, size, 3), dtype=np.uint8))


class Colors:
    """The mean and the deviation of each channel as features."""

    def features(self, images: Sequence[Image.Image]) -> torch.Tensor:
        pixels = [np.asarray(image.convert("RGB"), np.float32) for image in images]
        rows = [np.concatenate([p.mean((0, 1)), p.std((0, 1))]) for p in pixels]
        return torch.from_numpy(np.stack(rows) if rows else np.zeros((0, 6), np.float32))

    def identity(self) -> dict[str, Any]:
        return {"name": "colors"}


def row(group: str, before: Sequence[Image.Image], after: Sequence[Image.Image]) -> Row:
    return Row(
        group=group,  # type: ignore[arg-type]
        prompt="a dog",
        seeds=tuple(range(len(before))),
        before=tuple(before),
        after=tuple(after),
    )


def by_formula(one: Sequence[Image.Image], other: Sequence[Image.Image]) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1^(1/2) C2 C1^(1/2))^(1/2)), by eigenvalues."""
    first, second = (Colors().features(x).double().numpy() for x in (one, other))
    means = first.mean(0) - second.mean(0)
    c1, c2 = np.cov(first.T), np.cov(second.T)
    values, vectors = np.linalg.eigh(c1)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    middle = np.sqrt(np.linalg.eigvalsh(root @ c2 @ root).clip(0)).sum()
    return float(means @ means + np.trace(c1) + np.trace(c2) - 2 * middle)


def inception_weights(fidelity: Any) -> dict[str, torch.Tensor]:
    """Random weights of torch-fidelity's InceptionV3, which can't be built without a file."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(fidelity, "load_state_dict_from_url", lambda *_, **__: {})
        network = fidelity.FeatureExtractorInceptionV3
        patched.setattr(network, "load_state_dict", lambda *_: None)
        return dict(network("inception-v3-compat", ["2048"], verbose=False).state_dict())


def test_distances_are_those_of_the_formula() -> None:
    pytest.importorskip("torchmetrics")
    reference = [noise(i) for i in range(70)]
    before = [noise(100 + i) for i in range(40)]
    after = [noise(200 + i, 20, 200) for i in range(40)]
    rows = [
        row("untouched", before[:30], after[:30]),
        row("relative", before[30:], after[30:]),
        # What was erased should change, and is left out.
        row("erased", [noise(1)], [Image.new("RGB", (8, 8))]),
    ]
    known = FrechetReference(iter(reference), Colors())
    found = known.distances(rows)
    assert found.before == pytest.approx(by_formula(reference, before), rel=1e-6)
    assert found.after == pytest.approx(by_formula(reference, after), rel=1e-6)
    assert found.between == pytest.approx(by_formula(before, after), rel=1e-6)
    assert found.after > found.before
    assert (found.pictures, found.reference, found.width) == (40, 70, 6)
    assert not list(found.warnings())
    assert found.model["name"] == "colors" and found.model["torchmetrics"]
    # A second question of the same reference has the same answer.
    assert known.distances(rows) == found
    unchanged = known.distances([row("untouched", before, before)])
    assert unchanged.between == pytest.approx(0, abs=1e-6)
    assert unchanged.after == unchanged.before


def test_few_pictures_are_warned_of_and_one_is_refused() -> None:
    pytest.importorskip("torchmetrics")
    with pytest.raises(ValueError, match="images: .* at least 2 pictures a side, got 1"):
        FrechetReference([noise(0)], Colors())
    known = FrechetReference([noise(i) for i in range(4)], Colors())
    with pytest.raises(ValueError, match="rows: .*got 0; draw more relatives"):
        known.distances([row("erased", [noise(1)] * 3, [noise(2)] * 3)])
    found = known.distances([row("untouched", [noise(5), noise(6)], [noise(7), noise(8)])])
    assert "of 2 pictures and 6 features are biased" in " ".join(found.warnings())


def test_one_process_of_several_takes_the_distance_of_its_own(monkeypatch) -> None:
    pytest.importorskip("torchmetrics")
    known = FrechetReference([noise(i) for i in range(4)], Colors())
    rows = [row("untouched", [noise(5), noise(6)], [noise(7), noise(8)])]
    alone = known.distances(rows)
    # There is no process group: whatever talks to the others fails.
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    assert known.distances(rows) == alone


def test_clip_gives_features() -> None:
    judge = ClipJudge(*tiny_clip())
    images = [noise(i, size=40) for i in range(3)]
    features = judge.features(images)
    assert features.shape == (3, 16) and features.dtype == torch.float32
    assert judge.features([]).shape == (0, 16)
    # Not normalized: their lengths differ.
    assert features.norm(dim=1).std() > 0


def test_inception_reads_weights_of_the_users(tmp_path: Path) -> None:
    pytest.importorskip("torchmetrics")
    fidelity = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    path = tmp_path / "weights.pth"
    weights = inception_weights(fidelity)
    torch.save(weights, path)
    network = InceptionFeatures(path)
    images = [noise(0, size=64), noise(1, size=48)]
    features = network.features(images)
    assert features.shape == (2, 2048) and torch.isfinite(features).all()
    assert torch.equal(network.features(images[1:]), features[1:])
    pinned = network.identity()
    assert len(pinned["weights_sha256"]) == 64 and pinned["torch-fidelity"]
    del weights["fc.bias"]
    torch.save(weights, path)
    with pytest.raises(ValueError, match="holds other weights .*fc.bias"):
        InceptionFeatures(path)
    torch.save({"weights": Path("x")}, path)
    with pytest.raises(ValueError, match="holds no weights alone"):
        InceptionFeatures(path)


def test_a_folder_is_read_in_order(tmp_path: Path) -> None:
    for i in (2, 0, 1):
        noise(i).convert("L").save(tmp_path / f"{i}.png")
    (tmp_path / "notes.txt").write_text("no picture")
    found = list(pictures_in(tmp_path))
    assert [p.mode for p in found] == ["RGB"] * 3
    assert found[2].tobytes() == noise(2).convert("L").convert("RGB").tobytes()
    (tmp_path / "3.png").write_bytes(b"broken")
    with pytest.raises(ValueError, match="3.png is not a picture"):
        list(pictures_in(tmp_path))
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match="holds no pictures"):
        list(pictures_in(empty))


def test_without_the_packages_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'realera_fast\[eval\]'"):
        FrechetReference([noise(0), noise(1)], Colors())
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'realera_fast\[eval\]'"):
        InceptionFeatures(tmp_path / "none.pth")
