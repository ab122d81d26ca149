"""What commands say when a model can't be loaded: the library's words, its arguments as options."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from realera_fast import embedded, models
from realera_fast.cli.loading import find_device, load_pipeline
from realera_fast.cli.options import CommandError

ARGUMENTS: dict[str, Any] = {"dtype": "fp32", "device": "cpu", "variant": None, "base": None}


@pytest.mark.parametrize("name", ["device", "variant", "base"])
def test_an_argument_becomes_its_option(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise models.LoadError(f"`{name}` x: no; pass `{name}` y, not `revision`")

    monkeypatch.setattr(models, "load_pipeline", refuse)
    with pytest.raises(CommandError) as error:
        load_pipeline("./model", **ARGUMENTS)
    # What other libraries put in backticks is no option of ours.
    assert str(error.value) == f"--{name} x: no; pass --{name} y, not `revision`"


def test_refusals_name_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for call in (
        lambda: find_device("cuda"),
        lambda: load_pipeline("embedded", **(ARGUMENTS | {"device": "cuda"})),
        lambda: load_pipeline(str(tmp_path), **(ARGUMENTS | {"device": "cuda"})),
    ):
        with pytest.raises(CommandError, match="^--device cuda: this PyTorch .* sees no GPU"):
            call()
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(CommandError, match="pass --base with a pipeline folder"):
        load_pipeline(str(tmp_path / "model.safetensors"), **ARGUMENTS)


def test_a_missing_embedded_model_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "FOLDER", tmp_path)
    with pytest.raises(CommandError, match="does not hold the embedded model"):
        load_pipeline("embedded", **ARGUMENTS)
