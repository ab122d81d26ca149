"""Pipelines by name: what loads, and what a refusal tells a caller who has no command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_pipeline

from realera_fast.models import LoadError, find_device, load_pipeline


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pipeline")
    tiny_pipeline().save_pretrained(path)
    return path


def test_a_folder_loads_in_the_dtype_asked_for(folder: Path) -> None:
    pipe = load_pipeline(str(folder), dtype=torch.bfloat16, device="cpu")
    assert type(pipe) is type(tiny_pipeline())
    assert (pipe.unet.dtype, pipe.unet.device.type) == (torch.bfloat16, "cpu")
    base = tiny_pipeline().unet.state_dict()
    loaded = load_pipeline(str(folder), device="cpu").unet.state_dict()
    assert all(value.equal(loaded[name]) for name, value in base.items())


def test_no_device_is_the_best_one_here() -> None:
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert find_device(None) == torch.device(expected)
    assert find_device("cpu") == torch.device("cpu")


def test_devices_on_which_nothing_can_be_erased(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(LoadError, match="`device` mps: MPS has no float64.*erase on the CPU"):
        find_device("mps")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [find_device(name).index for name in ("cuda", "cuda:0", "cuda:1")] == [None, 0, 1]
    with pytest.raises(
        LoadError, match="cuda:2: there is no such GPU; the last one here is cuda:1"
    ):
        find_device("cuda:2")


def refused(message: str, model: Any, **options: Any) -> None:
    with pytest.raises(LoadError, match=message) as error:
        load_pipeline(str(model), device=options.pop("device", "cpu"), **options)
    # Who calls a function has no flags to pass.
    assert "--" not in str(error.value)


def test_refusals_name_arguments(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused("^`device`: no such device: 'toaster'", folder, device="toaster")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused("^`device` cuda: this PyTorch .* sees no GPU", folder, device="cuda")
    refused("pass `variant` fp16", folder, variant="ema")
    file = tmp_path / "model.safetensors"
    file.touch()
    refused("is a single file; pass `base` with a pipeline folder", file)
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "model_index.json").write_text('{"_class_name": "DiffusionPipeline"}')
    refused("^`base` .*can't be loaded from a single file", file, base=tmp_path / "base")


def test_refusals_name_the_model(tmp_path: Path) -> None:
    refused("no such folder", tmp_path / "nowhere")
    refused("not a diffusers pipeline folder: no model_index.json", tmp_path)
    refused("hf download nobody/nothing", "nobody/nothing")
    (tmp_path / "model.ckpt").touch()
    refused("expected a .safetensors file", tmp_path / "model.ckpt")
