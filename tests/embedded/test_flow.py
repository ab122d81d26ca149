"""The flow-matching sibling that ships: a stock pipeline that draws what it is asked for."""

import dataclasses
import json

import pytest
import torch

from realera_fast import EraseConfig, erase
from realera_fast.embedded import FOLDER, load_judge
from realera_fast.embedded.flow import FLOW, SAMPLING, flow_reading, flow_words, load_flow
from realera_fast.evaluation import Sampling, generate


@pytest.fixture(scope="module")
def pipe():
    return load_flow()


def drawn(pipe, prompts: list[str]) -> list[str]:
    """What the judge sees in a picture of each."""
    options = dict(SAMPLING)
    sampling = Sampling(
        steps=6, guidance=options.pop("guidance_scale"), **{k: options[k] for k in SIZES}
    )
    pictures = generate(pipe, prompts, list(range(len(prompts))), sampling, progress=False)
    return load_judge().classify(pictures)[0]


SIZES = ("height", "width", "max_sequence_length")
NAMES = ["cat", "guitar", "wizard", "apple", "airplane", "castle"]


def test_only_its_denoiser_is_stored() -> None:
    index = json.loads((FOLDER / FLOW / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusion3Pipeline"
    assert index["transformer"] == ["diffusers", "SD3Transformer2DModel"]
    assert index["scheduler"] == ["diffusers", "FlowMatchEulerDiscreteScheduler"]
    assert len(list((FOLDER / FLOW).rglob("*.safetensors"))) == 1


def test_accuracy_is_measured_for_every_word() -> None:
    table = flow_words()
    for entry in (*table.things, *table.styles[1:]):
        assert all(word in table.accuracy for word in (entry.name, *entry.said, *entry.unsaid))


def test_it_draws_what_it_is_asked_for(pipe) -> None:
    seen = drawn(pipe, [f"a photo of a {name}" for name in NAMES])
    assert sum(a == b for a, b in zip(seen, NAMES, strict=True)) >= 5


def test_the_closed_form_erases_from_it(pipe) -> None:
    before = {name: value.clone() for name, value in pipe.transformer.state_dict().items()}
    fast = EraseConfig.fast()
    config = dataclasses.replace(
        fast,
        mining=dataclasses.replace(fast.mining, mode="none", relative_words=0),
        vocabulary=dataclasses.replace(fast.vocabulary, words=100, preserve_scale=40.0),
    )
    erasure = erase(
        pipe, ["cat"], config=config, reading=flow_reading(pipe.transformer), progress=False
    )
    seen = drawn(pipe, ["a photo of a cat"] * 4 + ["a photo of a guitar", "a photo of a castle"])
    erasure.restore_(pipe.transformer)
    assert "cat" not in seen[:4] and seen[4:] == ["guitar", "castle"]
    after = pipe.transformer.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
