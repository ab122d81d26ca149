"""One file a stage, complete or absent; nothing without a folder."""

from __future__ import annotations

import pytest
import torch

from realera_fast.runtime import Checkpoint, CheckpointError, checkpoint

TENSORS = {"x": torch.arange(6.0).view(2, 3).mT, "n": torch.tensor(3)}


def test_without_a_folder_nothing_happens():
    saved = Checkpoint(run="a", resume=True)
    assert saved.file("stage") is None and saved.load("stage") is None
    assert not saved.is_due("stage", always=True)
    saved.save("stage", TENSORS, {})
    saved.remove("stage")


def test_a_stage_goes_on_only_where_it_is_asked_to(tmp_path):
    folder = tmp_path / "made" / "when needed"
    Checkpoint(folder, "a").save("stage", TENSORS, {"number": 7})
    assert [path.name for path in folder.iterdir()] == ["stage.safetensors"]
    assert Checkpoint(folder, "a").load("stage") is None
    state = Checkpoint(folder, "a", resume=True).load("stage")
    assert state is not None and state.values == {"number": 7}
    assert all(torch.equal(value, TENSORS[name]) for name, value in state.tensors.items())
    assert Checkpoint(folder, "a", resume=True).load("another stage") is None
    with pytest.raises(CheckpointError, match="of another run"):
        Checkpoint(folder, "b", resume=True).load("stage")
    Checkpoint(folder, "b").remove("stage")
    Checkpoint(folder, "b").remove("stage")
    assert not list(folder.iterdir())


def test_a_stage_is_saved_now_and_then(tmp_path, monkeypatch):
    now = 1000.0
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: now)
    saved = Checkpoint(tmp_path, "a")
    saved.load("stage")
    assert not saved.is_due("stage") and saved.is_due("stage", always=True)
    now += checkpoint.SECONDS
    assert saved.is_due("stage")
    saved.save("stage", {}, {})
    assert not saved.is_due("stage")
    # Every stage has its own time.
    assert saved.is_due("another stage")
