"""The four numbers of an erasure, against published tables and their limits."""

from __future__ import annotations

import pytest

from realera_fast.evaluation import Scores, accuracy
from realera_fast.evaluation.metrics import harmonic_mean

# MACE (arXiv 2403.06135), table 4, erasing 100 people: Acc_e, Acc_s and H_c, all in percent.
PEOPLE = [(67.79, 85.05, 46.72), (0.08, 32.16, 48.66), (18.70, 61.78, 70.21), (4.31, 84.56, 89.78)]

# The same paper's table 1, *means over ten objects*: Acc_e, Acc_s, Acc_g and the mean H_o.
OBJECTS = {
    "FMN": (96.96, 96.73, 82.56, 6.13),
    "SLD-M": (84.14, 98.54, 67.35, 26.32),
    "ESD-x": (26.93, 97.32, 31.61, 76.91),
    "ESD-u": (18.27, 86.76, 16.26, 83.69),
    "UCE": (13.54, 98.45, 23.18, 85.48),
    "MACE": (8.49, 97.35, 10.53, 92.61),
}


@pytest.mark.parametrize(("acc_e", "acc_s", "h_c"), PEOPLE)
def test_published_people(acc_e: float, acc_s: float, h_c: float) -> None:
    # The table's last column, to all the digits that its rounded inputs determine.
    assert 100 * Scores.from_percentages(acc_e, acc_s).h_o == pytest.approx(h_c, abs=0.01)


@pytest.mark.parametrize("method", OBJECTS)
def test_published_object_means(method: str) -> None:
    acc_e, acc_s, acc_g, mean_h_o = OBJECTS[method]
    h_o_of_means = 100 * Scores.from_percentages(acc_e, acc_s, acc_g).h_o
    # The harmonic mean is concave, so the mean of H_o lies below H_o of the means: by 0.05 for
    # the best method and never by more than 3 points.
    assert mean_h_o < h_o_of_means < mean_h_o + 3


def test_percentages() -> None:
    scores = Scores.from_percentages(8.49, 97.35, 10.53)
    assert scores.percentages() == {"Acc_e": 8.49, "Acc_s": 97.35, "Acc_g": 10.53, "H_o": 92.66}


def test_limits() -> None:
    assert Scores(acc_e=0, acc_s=1, acc_g=0).h_o == 1.0
    assert Scores(acc_e=1, acc_s=1, acc_g=0).h_o == 0.0  # nothing erased
    assert Scores(acc_e=0, acc_s=0, acc_g=0).h_o == 0.0  # everything destroyed
    assert Scores(acc_e=0, acc_s=1, acc_g=1).h_o == 0.0  # synonyms untouched
    # The limit is continuous: H_o -> 0 as one term does.
    assert 0 < Scores(acc_e=0.999999, acc_s=1, acc_g=0).h_o < 1e-5


def test_without_synonyms_it_is_the_mean_of_two() -> None:
    scores = Scores(acc_e=0.2, acc_s=0.5)
    assert scores.h_o == pytest.approx(2 / (1 / 0.8 + 1 / 0.5))
    assert scores.percentages()["Acc_g"] is None
    assert scores.to_dict()["acc_g"] is None


def test_better_numbers_are_better() -> None:
    base = Scores(acc_e=0.2, acc_s=0.9, acc_g=0.3)
    assert Scores(acc_e=0.1, acc_s=0.9, acc_g=0.3).h_o > base.h_o
    assert Scores(acc_e=0.2, acc_s=0.95, acc_g=0.3).h_o > base.h_o
    assert Scores(acc_e=0.2, acc_s=0.9, acc_g=0.2).h_o > base.h_o


@pytest.mark.parametrize("value", [-0.01, 1.01, float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["acc_e", "acc_s", "acc_g"])
def test_fractions_only(name: str, value: float) -> None:
    values = {"acc_e": 0.5, "acc_s": 0.5, "acc_g": 0.5} | {name: value}
    with pytest.raises(ValueError, match=rf"{name} must be a fraction"):
        Scores(**values)


def test_percentages_in_place_of_fractions_are_named() -> None:
    with pytest.raises(ValueError, match=r"divide by 100: 0\.0849"):
        Scores(acc_e=8.49, acc_s=0.9735, acc_g=0.1053)


def test_harmonic_mean() -> None:
    assert harmonic_mean([0.25]) == 0.25
    assert harmonic_mean([0.5, 1.0]) == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="no values"):
        harmonic_mean([])


def test_accuracy() -> None:
    assert accuracy(["cat", "dog", "cat", "ship"], ["cat", "cat", "cat", "ship"]) == 0.75
    with pytest.raises(ValueError, match="same length, got 1 and 2"):
        accuracy(["cat"], ["cat", "dog"])
    with pytest.raises(ValueError, match="no pictures"):
        accuracy([], [])
