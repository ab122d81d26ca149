"""What the report measures is what its docstring says."""

from __future__ import annotations

import time

import pytest
import torch
from torch import Tensor

from realera_fast.erasure.report import Movement
from realera_fast.text import AlignedPrompts

WIDTH = 24


def weights(heights=(8, 16, 24)) -> list[Tensor]:
    return [torch.randn(height, WIDTH) for height in heights]


def prompts(count=3, tokens=5) -> AlignedPrompts:
    source, destination = torch.randn(2, count, tokens, WIDTH)
    weight = torch.ones(count, tokens)
    weight[:, 0] = 0.0
    return AlignedPrompts(
        "cat", ("",) * count, ("",) * count, source, destination, destination, weight, 0
    )


def distance(rows: Tensor, matrices: list[Tensor]) -> float:
    return float(torch.cat([rows.double() @ m.double().T for m in matrices], dim=1).norm())


def directly(before: list[Tensor], after: list[Tensor], word: AlignedPrompts) -> float:
    rows = word.weight > 0
    x, y = word.source[rows].double(), word.destination[rows].double()
    pairs = list(zip(before, after, strict=True))
    left = torch.cat([x @ new.double().T - y @ old.double().T for old, new in pairs], dim=1).norm()
    return 1.0 - float(left) / distance(x - y, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_moved_is_the_fraction_of_the_way(dtype):
    before = [w.to(dtype) for w in weights()]
    after = [(w.float() + 0.1 * torch.randn(w.shape)).to(dtype) for w in before]
    word = prompts()
    assert Movement(before, after).moved(word) == pytest.approx(directly(before, after, word))


def test_a_word_that_met_its_anchor_is_told_from_one_that_nearly_did():
    before, word = weights(), prompts(count=1, tokens=4)
    # W' x = W y for every row, up to float32.
    x, y = word.source[0, 1:].double(), word.destination[0, 1:].double()
    change = torch.linalg.pinv(x) @ (y - x)
    exact = [(w.double() + (w.double() @ change.T)).float() for w in before]
    moved = Movement(before, exact).moved(word)
    assert moved == pytest.approx(1.0, abs=1e-5) and moved <= 1.0
    nearly = [w + 1e-4 * torch.randn(w.shape) for w in exact]
    assert Movement(before, nearly).moved(word) == pytest.approx(
        directly(before, nearly, word), abs=1e-7
    )


def test_a_word_without_a_way_to_go_has_no_fraction():
    before = weights()
    word = prompts()
    stays = AlignedPrompts(
        "cat", word.prompts, word.prompts, word.source, word.source, word.source, word.weight, 0
    )
    assert Movement(before, weights()).moved(stays) is None


def test_drift_is_in_distances_between_words():
    before = weights()
    after = [w + 0.1 * torch.randn(w.shape) for w in before]
    hidden = torch.randn(6, 5, WIDTH)
    carries = torch.ones(6, 5, dtype=torch.bool)
    carries[:, 0] = False
    found = Movement(before, after).drifts(hidden, carries)
    x = hidden[:, 1:]
    spread = distance((x - x.mean(0)).flatten(0, 1), before) / len(x) ** 0.5
    change = [new - old for new, old in zip(after, before, strict=True)]
    assert found == pytest.approx([distance(prompt, change) / spread for prompt in x])
    (alone,) = Movement(before, after).drifts(hidden[:1], carries[:1])
    assert alone == pytest.approx(distance(x[0], change) / distance(x[0], before))


def test_full_size_takes_seconds():
    # Stable Diffusion 1: 32 matrices of width 768. A product for each word took minutes.
    heights = [320] * 10 + [640] * 10 + [1280] * 12
    before = [torch.randn(height, 768) for height in heights]
    started = time.perf_counter()
    movement = Movement(before, [w + 0.01 for w in before])
    source = torch.randn(40, 77, 768)
    word = AlignedPrompts(
        "", ("",) * 40, ("",) * 40, source, source + 1, source, torch.ones(40, 77), 0
    )
    assert movement.moved(word) is not None
    # Seconds, where the direct way takes minutes: wide enough for a busy machine.
    assert time.perf_counter() - started < 60


def test_a_diverged_training_is_warned_of():
    from realera_fast.erasure.report import warnings_of

    found = warnings_of([], {"kept": False, "steps": 3, "stopped": "diverged: loss nan at step 4"})
    assert "loss nan at step 4; lower alignment.learning_rate" in found[0]
    assert "closed form stays alone" in found[1]
    assert not warnings_of([], {"kept": True, "steps": 3, "stopped": "all steps done"})
