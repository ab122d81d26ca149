"""The embedded model: a stock pipeline, small, quick to load, that draws what it is asked for."""

from __future__ import annotations

import json
import time

import pytest
import torch

from realera_fast.embedded import ACCURACY, FOLDER, load_judge, load_pipeline, words


@pytest.fixture(scope="module")
def pipe():
    return load_pipeline()


def test_it_is_a_small_stock_pipeline(pipe) -> None:
    index = json.loads((FOLDER / "pipeline" / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline"
    assert index["unet"] == ["diffusers", "UNet2DConditionModel"]
    assert index["tokenizer"] == ["transformers", "CLIPTokenizer"]
    files = [f for f in FOLDER.rglob("*") if f.is_file() and "__pycache__" not in f.parts]
    flow = [f for f in files if f.is_relative_to(FOLDER / "flow")]
    own = [f for f in files if f not in flow]
    assert sum(f.stat().st_size for f in own) <= 60e6
    assert 20e6 < sum(f.stat().st_size for f in flow) <= 40e6
    assert not [f for f in files if f.suffix in (".bin", ".pt", ".ttf", ".png")]


def test_its_tokenizer_is_clips(pipe) -> None:
    tokenizer = pipe.tokenizer
    assert len(tokenizer) == 49408 and tokenizer.model_max_length == 77
    # Numbers of CLIP's own tokenizer (arXiv 2103.00020).
    assert tokenizer("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]


def test_it_loads_in_two_seconds() -> None:
    # The best of three: other processes on the same cores make CPU time longer as well.
    took = []
    for _ in range(3):
        started = time.process_time()
        load_pipeline()
        took.append(time.process_time() - started)
    assert min(took) < 2


def test_words_lie_where_their_meanings_do(pipe) -> None:
    pairs = [("cat", "kitten"), ("horse", "stallion"), ("gun", "pistol")]
    apart = [("cat", "airplane"), ("horse", "teapot"), ("gun", "cloud")]

    def cosines(texts: list[tuple[str, str]]) -> list[float]:
        flat = [text for pair in texts for text in pair]
        ids = pipe.tokenizer(flat, padding=True, return_tensors="pt").input_ids
        with torch.no_grad():
            pooled = pipe.text_encoder(ids).pooler_output.view(len(texts), 2, -1)
        return torch.nn.functional.cosine_similarity(pooled[:, 0], pooled[:, 1]).tolist()

    assert min(cosines(pairs)) > 0.5 and max(cosines(apart)) < 0.3


def test_it_draws_what_it_is_asked_for(pipe) -> None:
    table, judge = words(), load_judge()
    names = ["cat", "ship", "rose", "wizard", "sword", "pizza"]
    prompts = [table.prompts(table.thing(name))[0] for name in names]
    prompts.append(table.scene(table.thing("cat"), table.thing("ship")))
    images = pipe(
        prompts,
        num_inference_steps=10,
        guidance_scale=table.sampling["guidance_scale"],
        height=64,
        width=64,
        generator=[torch.Generator().manual_seed(i) for i in range(len(prompts))],
        output_type="pt",
    ).images
    sights = judge.look(images)
    assert sum(sight.things == (name,) for sight, name in zip(sights, names, strict=False)) >= 5
    assert "cat" in sights[-1].things or "ship" in sights[-1].things


def test_accuracy_is_measured_for_every_word() -> None:
    table = words()
    measured = json.loads((FOLDER / ACCURACY).read_text(encoding="utf-8"))
    assert list(measured["name"]) == [thing.name for thing in table.things]
    assert list(measured["unsaid"]) == [w for thing in table.things for w in thing.unsaid]
    assert set(measured["said"]) == {w for thing in table.things for w in thing.said}
    counted = [word for thing in table.things for word in table.counted(thing)]
    assert len(counted) >= 200
    assert sum(bool(table.counted(thing)) for thing in table.things) >= 150
