"""Whole calls beside each other: what is measured, what is left out, what a call leaves behind."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from speed import full_size
from speed.models import Parts
from tiny_families import flux, sdxl
from tiny_models import tiny_pipeline

from realera_fast.models import streams

CPU = torch.device("cpu")


def _parts(model: str, *_: object) -> Parts:
    pipe = flux() if model == "FLUX" else sdxl() if model == "SDXL" else tiny_pipeline()
    if model == "SDXL":
        encoders = (pipe.text_encoder, pipe.text_encoder_2)
        return Parts(pipe.unet, encoders, (pipe.tokenizer, pipe.tokenizer_2), pipe.scheduler)
    if model == "FLUX":
        encoders = (pipe.text_encoder, pipe.text_encoder_2)
        return Parts(pipe.transformer, encoders, (pipe.tokenizer, pipe.tokenizer_2), None)
    return Parts(pipe.unet, (pipe.text_encoder,), (pipe.tokenizer,), pipe.scheduler)


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[full_size.Bench]:
    monkeypatch.setattr(full_size, "random_parts", _parts)
    made = full_size.Bench(CPU)
    made.names = ["cat", "dog", "ship"]
    yield made
    made.memory.stop()


@pytest.mark.parametrize("model", ["SD 1.4", "SDXL", "FLUX"])
def test_every_method_leaves_the_model_as_it_was(
    model: str, bench: full_size.Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = [p for p in full_size.points([model], CPU) if p.concepts == 1]
    rows, parts = [], _parts(model)
    maps = {name: parts.denoiser.get_submodule(name).weight for name in streams(parts.denoiser)}
    before = {name: weight.detach().clone() for name, weight in maps.items()}
    monkeypatch.setattr(full_size, "random_parts", lambda *_: parts)
    for point in calls:
        rows += bench.measure(point)
        for name, weight in before.items():
            assert torch.equal(maps[name], weight), point.title
    assert {row["method"] for row in rows} == {point.method for point in calls}
    for point in calls:
        whole = [r for r in rows if r["stage"] == "all" and r["method"] == point.method]
        assert all(r["seconds"] > 0 and r["peak_mb"] > 0 for r in whole) and whole
    assert len(list(full_size.lines(rows))) == len(rows)


def test_what_would_take_too_long_is_said_and_not_begun(
    bench: full_size.Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def script(*_: object) -> None:
        begun.append(1)

    begun: list[int] = []
    monkeypatch.setattr(full_size, "OF_UNETS", {"UCE": script})
    bench.measure(full_size.Point("SD 1.4", "UCE", "every", 1, "float32"))
    ten = full_size.Point("SD 1.4", "UCE", "every", 10, "float32")
    monkeypatch.setattr(full_size, "LONGEST", -1.0)
    assert bench.measure(ten) == [] and len(begun) == 1
    assert ten.title in capsys.readouterr().out


@pytest.mark.parametrize(
    ("earlier", "seconds"),
    [
        ([], 0.0),
        ([(1, 10.0)], 10.0),
        ([(1, 17.0), (1, 9.0)], 9.0),
        ([(1, 9.0), (10, 36.0)], 36.0),
        ([(1, 9.0), (5, 21.0)], 36.0),
    ],
)
def test_what_ten_concepts_are_expected_to_take(
    earlier: list[tuple[int, float]], seconds: float
) -> None:
    assert full_size.expected(10, earlier) == pytest.approx(seconds)


def test_models_are_measured_one_after_the_other() -> None:
    found = [point.model for point in full_size.points(["SDXL", "FLUX"], CPU)]
    assert found == sorted(found, reverse=True) and set(found) == {"SDXL", "FLUX"}
    assert len(set(full_size.points(["SD 1.4"], CPU))) == len(
        list(full_size.points(["SD 1.4"], CPU))
    )
