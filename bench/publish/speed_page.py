"""What docs/results/speed.md says: all tables of times, in order."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from harness import ROOT

from publish.speed_tables import (
    alignment_lines,
    closed_form_lines,
    entry_map_lines,
    full_size_lines,
    perturb_lines,
)

FOLDER = ROOT / "docs" / "results"
"""Plots of the page."""

PARTS: Sequence[tuple[str, Callable[[], list[str]], str, str]] = (
    (
        "Closed form",
        closed_form_lines,
        "closed_form.png",
        "Milliseconds of the closed form against the number of concepts, for the library, the "
        "floor and the baselines",
    ),
    (
        "Neighbors",
        perturb_lines,
        "perturb.png",
        "Time of eager PyTorch and of the bare products over the library's, for each operation "
        "and shape",
    ),
    (
        "Noise alignment",
        alignment_lines,
        "alignment.png",
        "Time of a plain training loop over the library's, with and without torch.compile",
    ),
    (
        "Whole calls",
        full_size_lines,
        "full_size.png",
        "Seconds of whole calls against the number of concepts, for the library and the baselines",
    ),
    ("Where to edit models with joint attention", entry_map_lines, "", ""),
)
"""Title, table, plot, and what the plot shows."""


def generated() -> list[str]:
    """Lines of the page's results."""
    lines = []
    for title, part, plot, shown in PARTS:
        found = part()
        if not found:
            continue
        lines += [f"## {title}", "", *found]
        if plot and (FOLDER / plot).exists():
            lines += [f"![{shown}]({plot})", ""]
    return lines
