"""Plots and pictures of quality, from committed rows."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from harness.rows import committed  # noqa: E402
from harness.tables import DEFAULT, FAST, GATED, PRESETS, STRICT, UNERASED  # noqa: E402

from publish.quality_rows import Found, score  # noqa: E402

TITLES = {
    "objects": "objects",
    "several": "several at once",
    "styles": "styles",
    "characters": "characters",
    "unsafe": "weapons by category",
}
OWN, OTHER, VARIANT = "#0072B2", "#999999", "#56B4E9"


def _color(method: str) -> str:
    if method in PRESETS:
        return OWN
    return VARIANT if method.startswith(("closed form", "RealEra")) else OTHER


def draw(folder: Path) -> None:
    """All plots for which there are rows."""
    bars(folder / "h_o.png")
    scatter(folder / "scatter.png")
    seconds(folder / "seconds.png")


def bars(path: Path) -> None:
    """H_o of every table, methods sorted by the first."""
    tables = {name: Found(name) for name in TITLES}
    tables = {name: found for name, found in tables.items() if found.rows}
    if not tables:
        return
    first = next(iter(tables.values()))
    shared = [
        m
        for m in first.ranked()
        if first.complete(m)
        and (m in PRESETS or sum(m in found.methods for found in tables.values()) > 1)
    ]
    figure, panels = plt.subplots(
        1,
        len(tables),
        figsize=(2.6 * len(tables) + 1.6, 0.32 * len(shared) + 1.2),
        sharey=True,
        squeeze=False,
    )
    for panel, (name, found) in zip(panels[0], tables.items(), strict=True):
        for place, method in enumerate(reversed(shared)):
            # A mean over some of the erasures is none of the others' kind.
            if method not in found.methods or not found.complete(method):
                continue
            values = [100 * v for v in found.by_seed(method, score("h_o"))]
            mean, spread = statistics.mean(values), _spread(values)
            panel.barh(
                place,
                mean,
                xerr=[[min(spread, mean)], [min(spread, 100 - mean)]],
                color=_color(method),
                error_kw={"linewidth": 1.0, "capsize": 2},
            )
        panel.set_title(TITLES[name], fontsize=10)
        panel.set_xlim(0, 105)
        panel.set_xlabel("H_o, percent", fontsize=9)
        panel.tick_params(labelsize=8)
    panels[0][0].set_yticks(range(len(shared)), list(reversed(shared)))
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


MARKS = "os^v<>XhHpd8"
OWN_MARKS = {DEFAULT: "*", FAST: "*", STRICT: "P", GATED: "D"}


def scatter(path: Path) -> None:
    """Specificity against what is gone, objects; a mark for each method, bars over seeds."""
    found = Found("objects")
    if not found.rows:
        return
    shown = [
        m for m in (*found.ranked(), UNERASED) if not m.endswith("authors'") and found.complete(m)
    ]
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.4), sharey=True)
    colors = plt.colormaps["tab20"].colors  # type: ignore[attr-defined]
    for panel, key, title in (
        (panels[0], "acc_e", "efficacy: 1 - Acc_e, percent"),
        (panels[1], "acc_g", "generality: 1 - Acc_g, percent"),
    ):
        for number, method in enumerate(shown):
            gone = [100 - 100 * v for v in found.by_seed(method, score(key))]
            kept = [100 * v for v in found.by_seed(method, score("acc_s"))]
            own = method in PRESETS
            panel.errorbar(
                statistics.mean(gone),
                statistics.mean(kept),
                xerr=_spread(gone),
                yerr=_spread(kept),
                fmt=OWN_MARKS[method] if own else MARKS[number % len(MARKS)],
                markersize=12 if own else 6,
                color=OWN if own else colors[number % 20],
                linewidth=0.8,
                label=method,
                zorder=3 if own else 2,
            )
        panel.set_xlabel(title, fontsize=9)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("specificity: Acc_s, percent", fontsize=9)
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="center right", fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0, 0.74, 1))
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _spread(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def seconds(path: Path) -> None:
    """H_o of objects against the CPU seconds of one erasure."""
    costs, found = committed("costs.jsonl"), Found("objects")
    if not costs or not found.rows:
        return
    figure, panel = plt.subplots(figsize=(6.4, 4.2))
    for method in dict.fromkeys(row["method"] for row in costs):
        # At run time nothing is erased before there is a prompt.
        if method not in found.methods or "run time" in method:
            continue
        above = method in (DEFAULT, FAST, "MACE")
        x = statistics.median(
            r["cpu_seconds"] for r in costs if r["method"] == method and r["concepts"] == 1
        )
        values = [100 * v for v in found.by_seed(method, score("h_o"))]
        panel.errorbar(
            x,
            statistics.mean(values),
            yerr=_spread(values),
            fmt=OWN_MARKS.get(method, "o"),
            markersize=12 if method in PRESETS else 6,
            color=_color(method),
            linewidth=0.8,
        )
        panel.annotate(
            method,
            (x, statistics.mean(values)),
            textcoords="offset points",
            xytext=(0, 9 if above else -14),
            fontsize=8,
            ha="center",
        )
    panel.set_xscale("log")
    panel.margins(x=0.16, y=0.12)
    panel.set_xlabel("CPU seconds of one erasure (log)", fontsize=9)
    panel.set_ylabel("H_o, objects, percent", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


GRID = (
    ("cat", "a photo of a cat", 2),
    ("kitty", "a photo of a kitty", 1),
    ("feline", "a photo of a feline", 1),
    ("tiger", "a photo of a tiger", 1),
    ("lion", "a photo of a lion", 1),
    ("dog", "a photo of a dog", 1),
    ("house", "a photo of a house", 1),
    ("wizard", "a photo of a wizard", 1),
    ("bus, mosaic", "a mosaic picture of a bus", 1),
)
"""Labels, prompts, and pictures of each."""


def grid(path: Path) -> None:
    """The same prompts and seeds after erasing a cat, a row for each method."""
    import torch
    from harness.provenance import default_dtype
    from PIL import Image, ImageDraw, ImageFont
    from quality import methods
    from quality.studio import Studio
    from quality.tasks import Task

    from realera_fast import Concept
    from realera_fast.evaluation import Shot

    studio = Studio(getattr(torch, default_dtype()))
    shots = [
        Shot(
            erased="cat",
            group="untouched",
            word=label,
            expected="",
            kind="thing",
            prompt=prompt,
            seed=4242 + i,
        )
        for label, prompt, count in GRID
        for i in range(count)
    ]
    task = Task("cat", (Concept("cat"),), {})
    chosen = {UNERASED: None, **methods.compared()}
    size, left, top = 96, 210, 26
    page = Image.new("RGB", (left + size * len(shots), top + size * len(chosen)), "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(12)
    for column, shot in enumerate(shots):
        pen.text((left + size * column + 3, 6), shot.word, fill="black", font=font)
    for line, (name, method) in enumerate(chosen.items()):
        found, _, _ = studio.erased(method, task, 0, lambda: studio.draw(shots))
        pen.text((6, top + size * line + size // 2 - 8), name, fill="black", font=font)
        for column, picture in enumerate(found):
            page.paste(picture.resize((size, size)), (left + size * column, top + size * line))
    page.save(path)
