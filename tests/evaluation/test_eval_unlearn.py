"""An erasure as a technique of eval-unlearn: its interface, and its runner if it is installed."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
from tiny_models import tiny_pipeline

import realera_fast.evaluation
from realera_fast import EraseConfig, erase
from realera_fast.evaluation import Sampling, UnlearnTechnique, generate
from realera_fast.evaluation.images import pixel_difference

ROOT = Path(__file__).parents[2]
SMALL = {"num_inference_steps": 2, "height": 16, "width": 16}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline folder and a delta for it."""
    root = tmp_path_factory.mktemp("files")
    pipe = tiny_pipeline()
    pipe.save_pretrained(root / "model")
    config = EraseConfig.from_dict({"alignment": {"enabled": False}, "mining": {"mode": "none"}})
    erase(pipe, ["cat=ship"], config=config, progress=False).save(root / "delta.safetensors")
    return root


@pytest.fixture(scope="module")
def technique(files: Path) -> UnlearnTechnique:
    model, delta = str(files / "model"), files / "delta.safetensors"
    return UnlearnTechnique(model, delta=delta, erase_concept="cat", device="cpu", **SMALL)


def test_the_entry_point_is_the_class() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    named = project["entry-points"]["eval_unlearn.techniques"]["realera_fast"]
    module, _, name = named.partition(":")
    assert module == realera_fast.evaluation.__name__
    assert getattr(realera_fast.evaluation, name) is UnlearnTechnique


def test_it_draws_from_the_edited_model(technique: UnlearnTechnique) -> None:
    prompts = ["a cat", "a dog"]
    drawn = technique.generate(prompts=prompts, seed=5)
    settings = Sampling(steps=2, guidance=7.5, height=16, width=16)
    expected = generate(technique.pipe, prompts, [5, 6], settings)
    assert [x.tobytes() for x in drawn] == [x.tobytes() for x in expected]
    original = generate(tiny_pipeline(), prompts, [5, 6], settings)
    assert pixel_difference(drawn[0], original[0]) > 0
    (wide,) = technique.generate(["a cat"], seed=None, width=24)
    assert wide.size == (24, 16)


def test_it_refuses(files: Path, technique: UnlearnTechnique) -> None:
    model = str(files / "model")
    with pytest.raises(ValueError, match="delta: expected a file, or erase_concept"):
        UnlearnTechnique(model)
    with pytest.raises(ValueError, match="dtype: expected one of fp32"):
        UnlearnTechnique(model, erase_concept="cat", dtype="int8")
    with pytest.raises(ValueError, match=r"erase_concept: .* erases \('cat'\), got 'dog'"):
        UnlearnTechnique(model, delta=files / "delta.safetensors", erase_concept="dog")
    with pytest.raises(TypeError, match="steps: no such setting; expected one of num_inference"):
        UnlearnTechnique(model, erase_concept="cat", steps=3)
    with pytest.raises(TypeError, match="eta: no such setting"):
        technique.generate(["a cat"], seed=0, eta=1.0)


def test_its_runner_runs_it(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stock runner finds it by the entry point, draws, and writes its report."""
    pytest.importorskip("eval_unlearn")
    from eval_unlearn.registry import entrypoints, register_metric
    from eval_unlearn.runners import SingleBenchmarkRunner
    from eval_unlearn.types import Dataset, MetricResult

    shown: list[Any] = []

    class Counted:
        """A metric on two prompts that counts pictures."""

        def __init__(self, **_: Any) -> None: ...

        def load_dataset(self) -> list[Any]:
            return [Dataset(prompts=["a cat", "a dog"], metadata={"source": "here"})]

        def update(self, images: Any, prompts: Any, metadata: Any) -> None:
            shown.extend(images)

        def compute(self) -> Any:
            return MetricResult(name="pictures", value=float(len(shown)))

    from importlib.metadata import EntryPoint

    mine = EntryPoint("realera_fast", "realera_fast.evaluation:UnlearnTechnique", "techniques")
    monkeypatch.setattr(
        entrypoints,
        "entry_points",
        lambda group: [mine] if group == "eval_unlearn.techniques" else [],
    )
    register_metric("counted")(Counted)
    runner = SingleBenchmarkRunner(
        technique_name="realera_fast",
        metric_name="counted",
        technique_config={
            "model": str(files / "model"),
            "delta": str(files / "delta.safetensors"),
            "erase_concept": "cat",
            "device": "cpu",
            **SMALL,
        },
        output_dir=str(tmp_path),
        seed=3,
    )
    report = runner.run()
    assert report["metric_result"]["value"] == 2.0 and report["erase_concept"] == "cat"
    assert [image.size for image in shown] == [(16, 16)] * 2
    written = [json.loads(p.read_text()) for p in tmp_path.rglob("*report*.json")]
    assert any(found["technique_name"] == "realera_fast" for found in written)
