"""Tables in Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

DEFAULT = "realera_fast"
"""Name of the library with its default settings, in tables of quality."""
FAST = "closed form alone"
"""The same without its second stage."""
STRICT = "strict"
"""The library with its preset against attacks."""
TEXT = "closed form of the text"
"""The same where the closed form is solved in the text, whatever is erased."""
GATED = "gated prompt map (run time)"
"""That as a map of prompts that hold the concept, with no weight changed."""
UNGATED = "prompt map (run time)"
"""That as a map of all prompts."""
IN_TURN = "closed form alone, one after the other"
"""Several erasures on top of each other."""
EXTENDED = "closed form alone, each extends those before"
"""The same with `extends=`, so that all that went so far goes in one."""
FIRST = "closed form alone, the first of them"
PRESETS = (DEFAULT, FAST, STRICT, GATED)
"""What a user of the library can ask for."""
UNERASED = "un-erased model"
"""Name of the model before anything is erased."""


def percent(values: Sequence[float]) -> str:
    """Mean and, of more than one value, standard deviation; a dash for none."""
    if not values:
        return "–"
    mean = 100 * statistics.mean(values)
    if len(values) < 2:
        return f"{mean:.1f}"
    return f"{mean:.1f} ± {100 * statistics.stdev(values):.1f}"


def table(header: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return lines + ["| " + " | ".join(cells) + " |" for cells in body]
