"""What docs/results/quality.md says: all tables of quality, in order."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from harness import ROOT

from publish.quality_parts import (
    attacks_lines,
    costs_lines,
    sweep_lines,
    unsafe_lines,
)
from publish.quality_standing import standing_lines
from publish.quality_tables import (
    flow_lines,
    lengthy_lines,
    model_lines,
    objects_lines,
    scores_lines,
    sequential_lines,
    several_lines,
    summary_lines,
    withheld_lines,
    worlds_lines,
)

FOLDER = ROOT / "docs" / "results" / "quality"
"""Plots and pictures of the page."""

PARTS: Sequence[tuple[str, Callable[[], list[str]]]] = (
    ("The model before anything is erased", model_lines),
    ("Ahead, tied, behind", standing_lines),
    ("All methods, all tables", summary_lines),
    ("Objects, and their near relatives", objects_lines),
    (
        "What each part brings",
        lambda: scores_lines(
            "parts",
            "The closed form as it comes, which takes the text or the values; values with less; "
            "the text, and the same with one part taken away or put in another's place: "
            "neighbors, the line between these and relatives, relatives that are held, scales, "
            "anchors. Things with many kinds and with few: automobile, bird, cat, ship.",
        ),
    ),
    ("Several at once", several_lines),
    ("One after the other", sequential_lines),
    ("Styles", lambda: scores_lines("styles", "Each judged style, by its name.")),
    (
        "Characters",
        lambda: scores_lines("characters", "Each judged character, by its name."),
    ),
    ("An unsafe category by its name", unsafe_lines),
    ("Synonyms that no list names", withheld_lines),
    ("Long prompts", lengthy_lines),
    ("Another world", worlds_lines),
    ("Flow matching", flow_lines),
    (
        "RealEra's parts",
        lambda: scores_lines(
            "ablation",
            "RealEra's parts as published (`EraseConfig.paper()`): noise around the concept goes "
            "to the anchor, what lies beyond stays, LoRA factors follow. Two things: cat and ship.",
        ),
    ),
    ("Attacks", attacks_lines),
    ("Costs", costs_lines),
    ("Settings of the baselines", sweep_lines),
)


def pictures() -> list[str]:
    """Links to the plots that are there."""
    shown = (
        ("h_o.png", "H_o of every method and table, with spread over seeds"),
        ("scatter.png", "Efficacy and generality against specificity"),
        ("seconds.png", "H_o against seconds"),
        ("pictures.png", "Pictures after erasing a cat, by method"),
    )
    return [f"![{text}](quality/{name})\n" for name, text in shown if (FOLDER / name).exists()]


def generated() -> list[str]:
    """Lines of the page's results."""
    lines = pictures()
    for title, part in PARTS:
        found = part()
        if found:
            lines += [f"## {title}", "", *found]
    return lines
