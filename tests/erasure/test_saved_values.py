"""Erasures of the tiny pipeline beside those that were saved before: the values stay.

Bits depend on the processor: its BLAS chooses the order of sums. So the tolerance is measured: how
far the values move when every weight of the model moves by a rounding. To record them anew, after
a change that is meant to change them, run this file.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from tiny_erase import CLOSED, CONFIG, FAST, run
from tiny_models import tiny_pipeline
from torch import Tensor

from realera_fast import Erasure

SAVED = Path(__file__).parent / "saved"
CONFIGS = {
    "closed_form": CLOSED,
    # Unchecked, so its factors stay.
    "aligned": dataclasses.replace(CONFIG, alignment=dataclasses.replace(FAST, steps=4)),
}
MARGIN = 4
"""Two processors may round apart, each twice as far as the weights' roundings happened to."""


def erased(name: str, pipe: StableDiffusionPipeline) -> Erasure:
    return run(pipe, ["cat=dog", "ship"], CONFIGS[name])


def rounded(seed: int) -> StableDiffusionPipeline:
    """The tiny pipeline, every weight one rounding larger or smaller."""
    pipe = tiny_pipeline()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in (*pipe.unet.parameters(), *pipe.text_encoder.parameters()):
            signs = 2 * torch.randint(0, 2, parameter.shape, generator=generator) - 1
            parameter.mul_(1 + torch.finfo(parameter.dtype).eps * signs)
    return pipe


def values(erasure: Erasure) -> dict[str, Tensor]:
    """The products of the factors, in float64: factors may turn and stay the same edit."""
    found = {"map": erasure.map.left.double() @ erasure.map.right.double()}
    for name, factors in erasure.lora.items():
        found[name] = factors.up.double() @ factors.down.double()
    return found


@pytest.mark.parametrize("name", CONFIGS)
def test_values_are_those_that_were_saved(name: str) -> None:
    before = Erasure.load(SAVED / f"{name}.safetensors")
    got, wanted = values(erased(name, tiny_pipeline())), values(before)
    assert got.keys() == wanted.keys() and len(got) == {"closed_form": 1, "aligned": 9}[name]
    others = [values(erased(name, rounded(seed))) for seed in (1, 2)]
    for part, value in got.items():
        moved = max(float((other[part] - value).norm()) for other in others)
        # A rounding that moved the values far would let everything pass.
        assert moved < 1e-3 * wanted[part].norm(), part
        error = float((value - wanted[part]).norm())
        assert error <= MARGIN * moved, f"{part}: {error:.3g} off, a rounding moves it {moved:.3g}"


def test_reports_are_those_that_were_saved() -> None:
    before, now = Erasure.load(SAVED / "aligned.safetensors"), erased("aligned", tiny_pipeline())
    assert now.concepts == before.concepts
    assert now.report.keys() == before.report.keys()
    for key in ("neighbors", "layers"):
        assert now.report[key].keys() == before.report[key].keys()
    words, known = ([(w["word"], w["role"]) for w in e.report["words"]] for e in (now, before))
    assert words == known
    assert now.report["alignment"]["kept"] and before.report["alignment"]["kept"]


if __name__ == "__main__":
    for name in CONFIGS:
        erased(name, tiny_pipeline()).save(SAVED / f"{name}.safetensors")
        (SAVED / f"{name}.md").unlink()
