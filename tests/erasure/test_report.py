"""What the report measures is what its docstring says."""

from __future__ import annotations

import time

import pytest
import torch
from torch import Tensor

from realera_fast.erasure.report import Movement, WordReport, warnings_of
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
    went = torch.cat([x @ (new.double() - old.double()).T for old, new in pairs], dim=1)
    way = torch.cat([(y - x) @ old.double().T for old, _ in pairs], dim=1)
    return float((went * way).sum() / way.square().sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_moved_is_the_fraction_of_the_way(dtype):
    before = [w.to(dtype) for w in weights()]
    after = [(w.float() + 0.1 * torch.randn(w.shape)).to(dtype) for w in before]
    word = prompts()
    assert Movement(before, after).moved(word) == pytest.approx(directly(before, after, word))


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0, 1.75])
def test_a_word_on_its_way_is_told_how_far_it_went(share: float) -> None:
    """Past its anchor as well: what went further than it had to is not on its way."""
    before, word = weights(), prompts(count=1, tokens=4)
    # W' x = W (x + share (y - x)) for every row, up to float32.
    x, y = word.source[0, 1:].double(), word.destination[0, 1:].double()
    change = share * torch.linalg.pinv(x) @ (y - x)
    after = [(w.double() + (w.double() @ change.T)).float() for w in before]
    assert Movement(before, after).moved(word) == pytest.approx(share, abs=1e-5)


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
    found = warnings_of([], {"kept": False, "steps": 3, "stopped": "diverged: loss nan at step 4"})
    assert "loss nan at step 4; lower alignment.learning_rate" in found[0]
    assert "closed form stays alone" in found[1]
    assert not warnings_of([], {"kept": True, "steps": 3, "stopped": "all steps done"})


def words(**moves: float) -> list[WordReport]:
    """Words that go, by how far, and words that stay, which begin with a vowel."""
    return [
        WordReport(word, "vocabulary", None, None, far)
        if word[0] in "aeiou"
        else WordReport(word, "target", "thing", far, None)
        for word, far in moves.items()
    ]


def test_who_went_past_an_anchor_is_not_warned_of() -> None:
    assert not warnings_of(words(cat=1.7, dog=1.0, pig=0.45, owl=0.55), {})
    (found,) = warnings_of(words(cat=0.35), {})
    assert "target 'cat' went only 35% of the way to what it is to become (thing)" in found


def test_words_that_should_stay_are_warned_of_in_one_line() -> None:
    (found,) = warnings_of(words(owl=0.7, ant=0.61, emu=0.3, eel=2.0), {})
    assert "'eel' 2.00, 'owl' 0.70, 'ant' 0.61; name" in found and "emu" not in found
    (found,) = warnings_of(words(**{f"a{number}": 1.0 for number in range(9)}), {})
    assert found.count("'") == 12 and "and 3 more" in found
