"""The numbers of README.md: three headlines and one table, each with a link to its page."""

from __future__ import annotations

import statistics

from harness.provenance import where
from harness.rows import committed
from harness.tables import FAST
from quality.methods import BASELINES

from publish.quality_rows import Found, near, own_method, score
from publish.quality_tables import summary_lines
from publish.speed_tables import closed_form_points, factor_text

QUALITY = "[docs/results/quality.md](docs/results/quality.md)"
AUTHORS = ", authors'"
"""Ends the name of a baseline with its authors' settings."""
SPEED = "[docs/results/speed.md](docs/results/speed.md)"


def headline() -> list[str]:
    """One bullet each: how well it erases, how fast, how small."""
    return [f"- {text}" for text in (quality_headline(), speed_headline(), size_headline()) if text]


def quality_headline() -> str:
    """H_o of the default beside the best baseline, of all others and of near relatives alone."""
    found = Found("objects")

    def means(method: str) -> str:
        every, close = (
            100 * statistics.mean(found.by_seed(method, value))
            for value in (score("h_o"), near("h_o"))
        )
        return f"{every:.1f} and {close:.1f}"

    ranked = found.ranked()
    others = [method for method in ranked if method.removesuffix(AUTHORS) in BASELINES]
    own = own_method(found) if found.rows else FAST
    if not others or own not in ranked:
        return ""
    every, close = means(own).split(" and ")
    how = " by the closed form alone" if own == FAST else ""
    return (
        f"**H_o {every}** on objects of the embedded model{how}, and {close} with nothing but near "
        f"relatives for the rest, against {means(others[0])} for the best baseline ({others[0]}): "
        f"{QUALITY}."
    )


def speed_headline() -> str:
    """The closed form of one concept on Stable Diffusion 1.4."""
    point = closed_form_points().get(("SD 1.4", "float32", 1, 1))
    if point is None or not {"uce", "composition"} <= set(point):
        return ""
    own = point["library"]
    return (
        f"**{own['p50_ms']:.1f} ms** for the closed form of one concept on Stable Diffusion 1.4 "
        f"({where(own)}, {own['threads']} threads); UCE's loop takes "
        f"{factor_text(point, 'uce')} as long a matrix, the best PyTorch composition "
        f"{factor_text(point, 'composition')}: {SPEED}."
    )


def size_headline() -> str:
    """The file of one concept's erasure from Stable Diffusion 1.4."""
    found = [
        row
        for row in committed("full_size.jsonl")
        if row["stage"] == "save" and row["concepts"] == 1
    ]
    if not found:
        return ""
    return (
        f"**{found[0]['file_mb']:.1f} MB** for the saved erasure of one concept from Stable "
        f"Diffusion 1.4, closed form: {SPEED}."
    )


def summary() -> list[str]:
    """Mean H_o of the methods that are in every table."""
    return summary_lines(f" All tables, plots and what each number means: {QUALITY}.")
