"""A second model of the same table: its choices, its folder, and its own tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from embedded import train
from embedded.bank import Bank, bank_scenes
from embedded.pipeline import build_unet
from embedded.text_encoder import build_text_encoder
from embedded.tokenizer import (
    MAX_TOKENS,
    MERGES,
    SPECIAL,
    build_tokenizer,
    first_tokens,
    learned_merges,
    vocabulary,
)
from embedded.world import FILE, World, choose_world, keep_world, world_of
from harness.rows import read

from realera_fast.embedded import FOLDER, load_judge, load_pipeline, words

SECOND = World(seed=7, text_width=256, tokens=600)
TEXTS = [f"a photo of a {word}" for word in words().spoken()]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory):
    merges = learned_merges(TEXTS, SECOND.tokens)
    return build_tokenizer(tmp_path_factory.mktemp("world") / "tokenizer", merges)


def test_the_default_world_is_the_shipped_one() -> None:
    assert World() == World(seed=20240, text_width=192, tokens=49_408)
    assert len(first_tokens()) + MERGES + len(SPECIAL) == World.tokens


def test_a_new_folder_takes_the_options_and_keeps_them(tmp_path: Path) -> None:
    none = dict(seed=None, text_width=None, tokens=None)
    assert choose_world(tmp_path / "none", **none) == World()
    world = choose_world(tmp_path, seed=7, text_width=256, tokens=600)
    assert world == SECOND
    keep_world(tmp_path, world)
    assert json.loads((tmp_path / FILE).read_text()) == dict(seed=7, text_width=256, tokens=600)
    assert world_of(tmp_path) == choose_world(tmp_path, **none) == SECOND
    # Nor does it change.
    assert choose_world(tmp_path, seed=7, text_width=None, tokens=600) == SECOND
    keep_world(tmp_path, World())
    assert world_of(tmp_path) == SECOND


@pytest.mark.parametrize("option", ["seed", "text_width", "tokens"])
def test_an_option_that_contradicts_the_folder_is_refused(option: str, tmp_path: Path) -> None:
    keep_world(tmp_path, SECOND)
    value = getattr(World, option)
    with pytest.raises(ValueError) as error:
        choose_world(tmp_path, **{option: value})
    name = option.replace("_", "-")
    said = f"--{name} {value}: {tmp_path / FILE} says {getattr(SECOND, option)}; leave the option"
    assert str(error.value).startswith(said) and "another --work folder" in str(error.value)


@pytest.mark.parametrize("result", ["bank.npy", "corpus.pt", "judge.safetensors"])
def test_results_without_a_file_are_of_the_default_world(result: str, tmp_path: Path) -> None:
    (tmp_path / "train.log").touch()
    assert choose_world(tmp_path, seed=7) == World(seed=7)
    (tmp_path / result).touch()
    assert world_of(tmp_path) == choose_world(tmp_path, seed=None) == World()
    assert choose_world(tmp_path, seed=World.seed) == World()
    with pytest.raises(ValueError, match=f"no {FILE}: it is {World.seed}; leave"):
        choose_world(tmp_path, seed=7)


def test_what_no_model_can_be_is_refused(tmp_path: Path) -> None:
    for fields, name in (
        (dict(seed=-1), "--seed -1"),
        (dict(text_width=200), "--text-width 200: expected a multiple of 32 up to 384"),
        (dict(text_width=416), "--text-width 416"),
        (dict(tokens=514), "--tokens 514: expected 515 or more"),
    ):
        with pytest.raises(ValueError, match=name):
            World(**fields)
    (tmp_path / FILE).write_text('{"seed": 7}')
    with pytest.raises(ValueError, match=rf"{FILE}: expected seed, text_width, tokens, got seed"):
        world_of(tmp_path)


@pytest.mark.parametrize("stage", ["all", "export", "sweep", "evaluate"])
@pytest.mark.parametrize("out", [[], ["--out", str(FOLDER)]])
def test_another_world_does_not_go_into_the_package(
    stage: str, out: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        train.main(["--work", str(tmp_path), "--stage", stage, "--seed", "7", *out])
    assert "--out: the package holds the default world" in capsys.readouterr().err
    # Nothing has begun, so that the options may still change.
    assert [*tmp_path.iterdir()] == []


def test_every_stage_begins_from_the_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    began = []

    def stage(work: Path, *of: Path | str) -> None:
        began.append((world_of(work), torch.initial_seed(), *of))

    monkeypatch.setattr(train, "STAGES", {"bank": stage})
    monkeypatch.setattr(train, "EXPORTED", {"export": stage})
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    work, out = tmp_path / "work", tmp_path / "model"
    train.main(["--work", str(work), "--stage", "bank", "--seed", "7"])
    train.main(["--work", str(work), "--out", str(out)])
    train.main(["--work", str(tmp_path / "first")])
    other = World(seed=7)
    assert began[:3] == [(other, 7), (other, 7), (other, 7, out, "unet")]
    assert began[3:] == [(World(), 20240), (World(), 20240, FOLDER, "unet")]
    with pytest.raises(SystemExit):
        train.main(["--work", str(work), "--stage", "bank", "--seed", "8"])
    assert f"{FILE} says 7" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        train.main(["--work", str(work), "--out", str(work)])


@pytest.mark.parametrize("denoiser", ["unet", "transformer"])
def test_all_stages_are_those_of_one_denoiser(
    denoiser: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    began = []
    stages = {name: lambda *of, name=name: began.append((name, *of[2:])) for name in train.STAGES}
    monkeypatch.setattr(train, "STAGES", stages)
    monkeypatch.setattr(train, "EXPORTED", {"export": stages["judge"]})
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    train.main(["--work", str(tmp_path), "--denoiser", denoiser])
    other = ({"unet", "transformer"} - {denoiser}).pop()
    assert began == [(n,) for n in stages if n != other] + [("judge", denoiser)]
    began.clear()
    train.main(["--work", str(tmp_path), "--stage", other, "--denoiser", denoiser])
    assert began == [(other,)]


def test_a_world_has_pictures_captions_and_weights_of_its_own(tokenizer) -> None:
    first, second = (
        Bank(np.empty(0), bank_scenes(seed)[:50], seed).captions for seed in (World.seed, 7)
    )
    assert len(first) == len(second) == 50 and first != second
    encoder, unet = build_text_encoder(tokenizer, SECOND), build_unet(SECOND)
    config = encoder.config
    assert config.hidden_size == config.intermediate_size // 4 == 256
    assert config.num_attention_heads == 8 and config.vocab_size == 600
    assert unet.config.cross_attention_dim == 256
    assert build_text_encoder(tokenizer, World()).config.num_attention_heads == 6


def test_a_learned_tokenizer_is_a_stock_one(tokenizer) -> None:
    from transformers import CLIPTokenizer

    assert type(tokenizer) is CLIPTokenizer
    assert len(tokenizer) == 600 and tokenizer.model_max_length == MAX_TOKENS == 77
    ids = tokenizer.get_vocab()
    assert sorted(ids.values()) == [*range(600)]
    assert [ids[token] for token in SPECIAL] == [598, 599]
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert (start, end, tokenizer.pad_token_id) == (598, 599, 599)
    found = tokenizer("cat", padding="max_length", truncation=True)["input_ids"]
    assert len(found) == 77 and found[0] == start and found.count(start) == 1 and found[-1] == end
    assert "photo" in vocabulary(tokenizer)


@pytest.mark.parametrize("text", ["a photo of a cat", "cat", "jellyfish, at night", "café 42"])
def test_a_learned_tokenizer_reads_back_what_it_wrote(text: str, tokenizer, tmp_path: Path) -> None:
    from transformers import CLIPTokenizer

    tokenizer.save_pretrained(tmp_path)
    loaded = CLIPTokenizer.from_pretrained(tmp_path)
    ids = tokenizer.encode(text)
    assert loaded.encode(text) == tokenizer.encode(f"  {text.upper()} ") == ids
    said = loaded.decode(ids, skip_special_tokens=True)
    assert said.replace(" ", "") == text.replace(" ", "")
    assert "," in text or "4" in text or said == text
    # What ends a word says so.
    assert loaded.convert_ids_to_tokens(ids)[-2].endswith("</w>")


def test_a_tokenizer_is_learned_twice_the_same() -> None:
    assert learned_merges(TEXTS, 560) == learned_merges(TEXTS, 600)[:46]


def test_an_exported_folder_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers import StableDiffusionPipeline

    def from_pretrained(folder: Path, **_: object) -> None:
        raise FileNotFoundError(folder)

    monkeypatch.setattr(StableDiffusionPipeline, "from_pretrained", from_pretrained)
    own = json.loads((FOLDER / "words.json").read_text())
    (tmp_path / "words.json").write_text(json.dumps(own | {"things": own["things"][:3]}))
    (tmp_path / "accuracy.json").write_text('{"name": {"cat": 0.5}}')
    table = words(tmp_path)
    assert len(table.things) == 3 and table.accuracy == {"cat": 0.5}
    assert words(str(tmp_path)) == table != words() == words(FOLDER)
    with pytest.raises(FileNotFoundError, match=str(tmp_path / "judge.safetensors")):
        load_judge(tmp_path)
    for folder in (tmp_path, FOLDER):
        with pytest.raises(FileNotFoundError, match=str(folder / "pipeline")):
            load_pipeline(folder=None if folder is FOLDER else folder)


def test_rows_of_another_world_are_on_no_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from harness import rows
    from publish.quality_rows import Found

    monkeypatch.setattr(rows, "RESULTS", tmp_path)
    row = {"table": "objects", "method": "own", "task": "cat", "seed": 0}
    path = tmp_path / "quality.jsonl"
    path.write_text("".join(f"{json.dumps(r)}\n" for r in (row, row | {"world": "second"})))
    assert len(read(path)) == 2 and Found("objects").rows == [row]
