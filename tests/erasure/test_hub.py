"""Erasures on the Hugging Face Hub: a server of this process, and what is said without one."""

from __future__ import annotations

import socket
from typing import Any

import pytest
from edits import edited
from hub_server import Hub, hub_server
from huggingface_hub import ModelCard, constants, errors
from tiny_families import sd1

from realera_fast import Erasure
from realera_fast.cli.program import run
from realera_fast.erasure import ErasureFileError, HubError

REPO = "someone/no-cats"


@pytest.fixture(scope="module")
def pipe() -> Any:
    return sd1()


@pytest.fixture(scope="module")
def erasure(pipe):
    return edited(pipe)


@pytest.fixture
def hub(monkeypatch):
    # The tests run offline: this server is no network.
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with hub_server() as hub:
        yield hub


def test_what_was_pushed_is_read_again(pipe, erasure, hub: Hub, tmp_path):
    address = erasure.push_to_hub(REPO, endpoint=hub.address, token="hf_own")
    assert address.startswith(f"{hub.address}/{REPO}/commit/")
    assert hub.tokens == {"Bearer hf_own"} and hub.commits[0]["summary"] == "Erasure of cat"
    assert set(hub.files[REPO]) == {"README.md", "erasure.safetensors"}
    card = ModelCard(hub.files[REPO]["README.md"].decode())
    assert card.data.library_name == "diffusers" and "concept-erasure" in card.data.tags
    assert f'Erasure.from_pretrained("{REPO}")' in card.text
    again = Erasure.from_pretrained(REPO, endpoint=hub.address, cache_dir=tmp_path)
    assert again.fingerprint == erasure.fingerprint and again.report == erasure.report
    # Then the cache is enough.
    hub.refusing = 503
    cached = Erasure.from_pretrained(REPO, cache_dir=tmp_path, local_files_only=True)
    assert cached.fingerprint == erasure.fingerprint


def test_an_adapter_goes_with_its_delta(pipe, erasure, hub: Hub, tmp_path):
    erasure.push_to_hub(REPO, adapter=True, model=pipe.unet, endpoint=hub.address)
    names = {"README.md", "erasure.safetensors", "pytorch_lora_weights.safetensors"}
    assert set(hub.files[REPO]) == names
    card = ModelCard(hub.files[REPO]["README.md"].decode())
    assert "lora" in card.data.tags and f'pipe.load_lora_weights("{REPO}"' in card.text
    saved = erasure.save_lora(tmp_path / "lora", pipe.unet)
    assert saved.read_bytes() == hub.files[REPO][saved.name]
    # One that was written before is the same; another erasure's is refused before anything is sent.
    hub.files.clear()
    erasure.push_to_hub(REPO, adapter=tmp_path / "lora", endpoint=hub.address)
    assert set(hub.files[REPO]) == names
    hub.files.clear()
    other = Erasure(erasure.map, {}, erasure.concepts, {}, erasure.provenance, {"other": True})
    with pytest.raises(ValueError, match="adapter: .* is of another erasure"):
        other.push_to_hub(REPO, adapter=tmp_path / "lora", endpoint=hub.address)
    assert not hub.files


def test_the_command_pushes_a_folder(pipe, erasure, hub: Hub, tmp_path, capsys):
    erasure.save(tmp_path / "erasure.safetensors")
    erasure.save_lora(tmp_path / "lora", pipe.unet)
    options = ["--endpoint", hub.address, "--message", "first"]
    assert run(["push", str(tmp_path), REPO, *options]) == 0
    assert "pushed to " in capsys.readouterr().out
    assert len(hub.files[REPO]) == 3 and hub.commits[0]["summary"] == "first"
    hub.files.clear()
    assert run(["push", str(tmp_path / "erasure.safetensors"), REPO, *options]) == 0
    assert set(hub.files[REPO]) == {"README.md", "erasure.safetensors"}
    assert run(["push", str(tmp_path / "none.safetensors"), REPO, *options]) == 1


def test_a_folder_is_read_as_it_lies(erasure, tmp_path):
    erasure.save(tmp_path / "erasure.safetensors")
    assert Erasure.from_pretrained(tmp_path).fingerprint == erasure.fingerprint
    with pytest.raises(FileNotFoundError):
        Erasure.from_pretrained(tmp_path, filename="other.safetensors")


def test_what_the_hub_answers_is_explained(erasure, hub: Hub, tmp_path, monkeypatch):
    place = {"endpoint": hub.address, "cache_dir": tmp_path}
    with pytest.raises(HubError, match="someone/none: no such repository, or it is private"):
        Erasure.from_pretrained("someone/none", **place)
    erasure.push_to_hub(REPO, endpoint=hub.address)
    with pytest.raises(HubError, match="holds no such file; an erasure is called"):
        Erasure.from_pretrained(REPO, filename="other.safetensors", **place)
    with monkeypatch.context() as older, pytest.raises(HubError, match="holds no such file"):
        older.delattr(errors, "RemoteEntryNotFoundError")
        Erasure.from_pretrained(REPO, filename="other.safetensors", **place)
    with pytest.raises(HubError, match="no such revision"):
        Erasure.from_pretrained(REPO, revision="v2", **place)
    hub.files[REPO]["erasure.safetensors"] = b"not what it was"
    with pytest.raises(ErasureFileError, match="safetensors"):
        Erasure.from_pretrained(REPO, **place)
    hub.refusing = 403
    with pytest.raises(
        HubError, match=r"refused it \(403\): log in with an account that may write"
    ):
        erasure.push_to_hub(REPO, endpoint=hub.address)
    with pytest.raises(ValueError, match="[Rr]epo"):
        erasure.push_to_hub("a/b/c", endpoint=hub.address)


def test_without_a_network_it_says_what_to_do(erasure, monkeypatch, tmp_path):
    told = "can't be reached .* save\\(\\) needs no network"
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{unused.getsockname()[1]}"
        for offline in (True, False):
            monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
            with pytest.raises(HubError, match=told):
                erasure.push_to_hub(REPO, endpoint=nobody)
    # A download tries again and again where nobody answers: the cache alone shows the same.
    with pytest.raises(HubError, match="not in the cache, .* hf download someone/no-cats"):
        Erasure.from_pretrained(REPO, local_files_only=True, cache_dir=tmp_path)
