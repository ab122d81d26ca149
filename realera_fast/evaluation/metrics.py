"""How an erasure is judged: efficacy, specificity, generality and their harmonic mean.

A judge (any classifier) looks at images of the edited model, and four numbers come out, the
ones of the object tables of MACE (Lu et al., arXiv 2403.06135) and RealEra (arXiv 2410.09140):

    Acc_e  efficacy     accuracy on the erased concept            lower is better
    Acc_s  specificity  accuracy on everything else               higher is better
    Acc_g  generality   accuracy on the erased concept's synonyms lower is better
    H_o = 3 / (1/(1 - Acc_e) + 1/Acc_s + 1/(1 - Acc_g))           higher is better

Every accuracy in this package is a fraction in [0, 1]. Percentages appear only where text is made
for people: `Scores.percentages`, tables, reports.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any


def accuracy(predicted: Sequence[Hashable], expected: Sequence[Hashable]) -> float:
    """The fraction of `predicted` that equals `expected`, position by position.

    Args:
        predicted: `[n]` labels that the judge gave.
        expected: `[n]` labels that the prompts asked for.

    Raises:
        ValueError: If the lengths differ or there is nothing to count.
    """
    if len(predicted) != len(expected):
        raise ValueError(
            f"predicted and expected must have the same length, "
            f"got {len(predicted)} and {len(expected)}"
        )
    if not predicted:
        raise ValueError("accuracy of no pictures is undefined: pass at least one prediction")
    return sum(p == e for p, e in zip(predicted, expected, strict=True)) / len(predicted)


def harmonic_mean(values: Sequence[float]) -> float:
    """The harmonic mean of fractions in [0, 1], continued to 0 where one of them is 0.

    The mean tends to 0 when any term does, so an eraser that fails completely on one axis
    (nothing erased, or everything destroyed) scores 0 whatever it does on the others.
    """
    if not values:
        raise ValueError("the harmonic mean of no values is undefined: pass at least one")
    for value in values:
        _check_fraction("values", value)
    if min(values) == 0:
        return 0.0
    return len(values) / sum(1 / value for value in values)


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Accuracies of one erasure, as fractions in [0, 1]."""

    acc_e: float
    """Accuracy on the erased concept (efficacy): lower is better."""

    acc_s: float
    """Accuracy on all other concepts (specificity): higher is better."""

    acc_g: float | None = None
    """Accuracy on synonyms that no concept named (generality): lower is better. None
    where no such synonym exists; `h_o` is then the mean of the two other terms, as in MACE's
    table for people."""

    def __post_init__(self) -> None:
        _check_fraction("acc_e", self.acc_e)
        _check_fraction("acc_s", self.acc_s)
        if self.acc_g is not None:
            _check_fraction("acc_g", self.acc_g)

    @property
    def h_o(self) -> float:
        """H_o, the harmonic mean of 1 - Acc_e, Acc_s and 1 - Acc_g, a fraction in [0, 1]."""
        terms = [1 - self.acc_e, self.acc_s]
        if self.acc_g is not None:
            terms.append(1 - self.acc_g)
        return harmonic_mean(terms)

    @classmethod
    def from_percentages(cls, acc_e: float, acc_s: float, acc_g: float | None = None) -> Scores:
        """Scores from a published row in percent, such as ``from_percentages(4.31, 84.56)``."""
        return cls(
            acc_e=acc_e / 100, acc_s=acc_s / 100, acc_g=None if acc_g is None else acc_g / 100
        )

    def percentages(self) -> dict[str, float | None]:
        """The four numbers in percent, two decimals: keys Acc_e, Acc_s, Acc_g, H_o."""
        return {
            "Acc_e": round(100 * self.acc_e, 2),
            "Acc_s": round(100 * self.acc_s, 2),
            "Acc_g": None if self.acc_g is None else round(100 * self.acc_g, 2),
            "H_o": round(100 * self.h_o, 2),
        }

    def to_dict(self) -> dict[str, Any]:
        """The four numbers as fractions, for JSON: keys acc_e, acc_s, acc_g, h_o."""
        return {"acc_e": self.acc_e, "acc_s": self.acc_s, "acc_g": self.acc_g, "h_o": self.h_o}


def _check_fraction(name: str, value: float) -> None:
    if not math.isfinite(value) or not 0 <= value <= 1:
        hint = f"; for percentages divide by 100: {value / 100:g}" if 1 < value <= 100 else ""
        raise ValueError(f"{name} must be a fraction in [0, 1], got {value}{hint}")
