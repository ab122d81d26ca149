"""Files of earlier releases are read as they were written.

`data/erasure_format.safetensors` was written by the code of commit 0577298, when format version 1
was the only one: an erasure of the tiny SDXL pipeline with its equations, and with alignment
factors of a key and of a query.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from model_state import same, weights
from safetensors import safe_open
from tiny_families import FAMILIES

from realera_fast.erasure import BaseModelMismatchError, Erasure, applied, read_description
from realera_fast.erasure.file import FORMAT_VERSION
from realera_fast.models import projections, queries_and_outputs
from realera_fast.text import Concept

FILE = Path(__file__).parent / "data" / "erasure_format.safetensors"
FINGERPRINT = "44a3e04b540dafe5958c6e7e786daf3637904c33c64f82ca6af110c3030ebea2"
KEY, QUERY = (
    f"down_blocks.1.attentions.0.transformer_blocks.0.attn2.{n}" for n in ("to_k", "to_q")
)


def plain(number: int, rows: int, columns: int) -> torch.Tensor:
    """`[rows, columns]` values that float16 and bfloat16 hold too, the same on every processor."""
    values = (torch.arange(rows * columns) * 37 + number * 11) % 101 - 50
    return values.reshape(rows, columns) / 256


def base_model() -> torch.nn.Module:
    """The model that the erasure of the file was made for."""
    unet = FAMILIES["sdxl"]().unet
    layers = {**projections(unet), **queries_and_outputs(unet)}
    for number, layer in enumerate(layers.values()):
        layer.weight.data.copy_(plain(number, *layer.weight.shape))
    return unet


def test_an_old_file_holds_what_was_written() -> None:
    erasure = Erasure.load(FILE)
    assert FORMAT_VERSION == 1, "keep a file of every version that is read"
    assert erasure.fingerprint == FINGERPRINT
    assert erasure.concepts == (Concept("cat", "dog", synonyms=("kitten",)), Concept("ship"))
    assert erasure.pooled_map is not None
    assert (erasure.map.width, erasure.map.rank) == (80, 80)
    assert (erasure.pooled_map.width, erasure.pooled_map.rank) == (48, 27)
    assert list(erasure.lora) == [KEY, QUERY]
    for number, name in enumerate(erasure.lora):
        factors = erasure.lora[name]
        assert torch.equal(factors.down, plain(number + 1, *factors.down.shape))
        assert torch.equal(factors.up, plain(number + 3, *factors.up.shape))
    with safe_open(FILE, framework="pt") as stored:
        for key, tensor in (
            ("map.left", erasure.map.left),
            ("map.right", erasure.map.right),
            ("pooled.left", erasure.pooled_map.left),
            ("pooled.right", erasure.pooled_map.right),
        ):
            assert torch.equal(stored.get_tensor(key), tensor), key
    assert erasure.config["closed_form"]["keep_system"] is True
    assert erasure.provenance["model_class"] == "UNet2DConditionModel"
    assert erasure.reading is not None and erasure.reading.name == "Stable Diffusion XL"
    assert erasure.report["solve"]["rank"] == 80
    assert read_description(FILE)["holds"] == "the factors of an erasure (a delta)"


def test_an_old_file_is_saved_with_the_same_bytes(tmp_path: Path) -> None:
    assert Erasure.load(FILE).save(tmp_path / "again").read_bytes() == FILE.read_bytes()


def test_an_old_file_is_applied_and_undone() -> None:
    erasure, unet = Erasure.load(FILE), base_model()
    before = weights(unet)
    changed = erasure.apply_(unet).state_dict()
    pooled = "add_embedding.linear_1"
    for name in (KEY, QUERY, pooled):
        assert not torch.equal(changed[f"{name}.weight"], before[f"{name}.weight"]), name
    erasure.restore_(unet)
    assert same(unet, before)
    with pytest.raises(BaseModelMismatchError, match="its projections have the float32 hash"):
        erasure.apply_(FAMILIES["sdxl"]().unet)


def test_concepts_are_taken_out_of_an_old_file() -> None:
    rest, unet = Erasure.load(FILE).without("cat"), base_model()
    assert [concept.target for concept in rest.concepts] == ["ship"]
    assert rest.system is not None and rest.pooled_system is not None
    rest.apply_(unet)
    assert applied(unet) == (rest,)
