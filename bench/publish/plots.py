"""Plots of times, from committed rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from harness import RESULTS, ROOT  # noqa: E402
from harness.provenance import where  # noqa: E402
from harness.rows import read  # noqa: E402
from harness.tables import DEFAULT  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.lines import Line2D  # noqa: E402
from matplotlib.ticker import FuncFormatter, LogLocator  # noqa: E402

FOLDER = ROOT / "docs" / "results"
ROWS = RESULTS / "closed_form.jsonl"
PICTURE = FOLDER / "closed_form.png"

# Colors of Okabe and Ito, which color-blind readers can tell apart.
LINES = {
    "uce": ("UCE loop", "#D55E00", "s"),
    "mace": ("MACE loop", "#CC79A7", "D"),
    "batched": ("batched torch.linalg.solve", "#E69F00", "^"),
    "composition": ("low rank, plain PyTorch", "#56B4E9", "v"),
    "library": ("realera_fast", "#000000", "o"),
}


def closed_form(rows: Path = ROWS, picture: Path = PICTURE) -> None:
    """Time against concepts, one panel for each shape."""
    found = read(rows)
    found = [
        row
        for row in found
        if row["stage"] == "total"
        and row["dtype"] == "float32"
        and row["rows"] == row["concepts"]
        and not row.get("preserved")
    ]
    if not found:
        raise SystemExit(f"{rows} holds no rows to draw: run bench/run.py closed_form")
    shapes = list(dict.fromkeys(row["shape"] for row in found))
    figure, panels = plt.subplots(
        1, len(shapes), figsize=(3.4 * len(shapes) + 0.6, 4.6), sharey=True, squeeze=False
    )
    for panel, shape in zip(panels[0], shapes, strict=True):
        draw(panel, [row for row in found if row["shape"] == shape])
        panel.set_title(f"{shape}, {matrices(found, shape)} matrices", fontsize=10)
        panel.set_xlabel("erased concepts (one row each)")
    panels[0][0].set_ylabel("time from rows to edited weights")
    handles = [
        Line2D(
            [],
            [],
            color=color,
            marker=marker,
            label=label,
            linewidth=2.2 if name == "library" else 1.4,
            markersize=5,
        )
        for name, (label, color, marker) in LINES.items()
    ]
    handles += [
        Line2D([], [], color="#777777", linestyle="--", label="floor of this machine"),
        Line2D(
            [],
            [],
            color="#777777",
            marker="o",
            linestyle="",
            markerfacecolor="white",
            label="open: fewer matrices measured, time scaled up",
        ),
    ]
    figure.legend(
        handles=handles,
        loc="lower center",
        ncols=4,
        frameon=False,
        fontsize=8.5,
        bbox_to_anchor=(0.5, 0.0),
    )
    first = found[0]
    figure.suptitle(
        f"float32, {where(first)}, {first['threads']} thread(s), torch {first['torch']}; "
        "medians, bars from p20 to p80",
        fontsize=8.5,
        color="#444444",
        y=0.985,
    )
    figure.tight_layout(rect=(0, 0.1, 1, 1))
    figure.savefig(picture, dpi=150)
    plt.close(figure)


PERTURB_ROWS = RESULTS / "perturb.jsonl"
PERTURB_PICTURE = FOLDER / "perturb.png"
PERTURB_MARKS = {
    "eager": ("as published codes do, eager", "#D55E00", "s"),
    "compiled": ("torch.compile of the definition", "#E69F00", "^"),
    "ceiling": ("bare write, product or sum alone", "#56B4E9", "v"),
}
PERTURB_NAMES = {
    "rows": "draw rows",
    "project": "project",
    "lora": "project + LoRA",
    "backward": "LoRA gradients",
    "accumulate": "normal equations",
}


def perturb(rows: Path = PERTURB_ROWS, picture: Path = PERTURB_PICTURE) -> None:
    """Time of the others over the library's, a line for each problem."""

    def title(row: dict[str, Any]) -> str:
        return (
            f"{PERTURB_NAMES[row['operation']]}, {row['shape']}, "
            f"{row['concepts']:,} x {row['samples']:,}, {row['dtype']}"
        )

    ratios(rows, picture, "perturb", PERTURB_MARKS, title)


ALIGNMENT_ROWS = RESULTS / "alignment.jsonl"
ALIGNMENT_PICTURE = FOLDER / "alignment.png"
ALIGNMENT_MARKS = {
    "plain": ("plain loop", "#D55E00", "s"),
    "plain compiled": ("plain loop, torch.compile", "#E69F00", "^"),
    "library compiled": ("realera_fast, torch.compile", "#56B4E9", "v"),
    "plain, new z_t": ("plain loop, z_t anew each step", "#CC79A7", "D"),
}
ALIGNMENT_NAMES = {
    "step": "step",
    "worst step": "step on the worst neighbors",
    "train": "step, all of training",
    "image": "picture, fuse",
}


def alignment(rows: Path = ALIGNMENT_ROWS, picture: Path = ALIGNMENT_PICTURE) -> None:
    """Time of the others over the library's, a line for each problem."""

    def title(row: dict[str, Any]) -> str:
        return f"{ALIGNMENT_NAMES[row['operation']]}, {row['model']}, {row['dtype']}"

    ratios(rows, picture, "alignment", ALIGNMENT_MARKS, title)


FULL_SIZE_ROWS = RESULTS / "full_size.jsonl"
FULL_SIZE_PICTURE = FOLDER / "full_size.png"
FULL_SIZE_LINES = {
    ("RECE", "every"): ("RECE", "#009E73", "^"),
    ("MACE, closed form", "every"): ("MACE, first stage", "#CC79A7", "D"),
    ("OCE", "every"): ("OCE", "#56B4E9", "v"),
    ("UCE", "every"): ("UCE", "#D55E00", "s"),
    (DEFAULT, "first"): ("realera_fast, first call", "#000000", "*"),
    (DEFAULT, "later"): ("realera_fast", "#000000", "o"),
}


def full_size(rows: Path = FULL_SIZE_ROWS, picture: Path = FULL_SIZE_PICTURE) -> None:
    """Seconds of whole calls against concepts, one panel for each model."""
    found = [row for row in read(rows) if row["stage"] == "all"]
    if not found:
        raise SystemExit(f"{rows} holds no rows to draw: run bench/run.py full_size")
    models = list(dict.fromkeys((row["model"], row["dtype"]) for row in found))
    figure, panels = plt.subplots(
        1, len(models), figsize=(max(6.6, 3.4 * len(models) + 0.6), 4.4), sharey=True, squeeze=False
    )
    for panel, (model, dtype) in zip(panels[0], models, strict=True):
        for (method, call), (_, color, marker) in FULL_SIZE_LINES.items():
            points = sorted(
                (row["concepts"], row["seconds"])
                for row in found
                if (row["model"], row["dtype"], row["method"], row["call"])
                == (model, dtype, method, call)
            )
            width = 2.2 if method == DEFAULT else 1.4
            x, y = [point[0] for point in points], [point[1] for point in points]
            panel.plot(x, y, color=color, marker=marker, linewidth=width, markersize=6)
        panel.set_title(f"{model}, {dtype}", fontsize=10)
        panel.set_xlabel("erased concepts")
        panel.set_xscale("log")
        panel.set_yscale("log")
        panel.xaxis.set_major_locator(LogLocator(numticks=9))
        panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} s"))
        panel.minorticks_off()
        panel.grid(color="#dddddd", linewidth=0.6)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(labelsize=8.5)
    panels[0][0].set_ylabel("seconds of the whole call")
    handles = [
        Line2D([], [], color=color, marker=marker, label=label)
        for label, color, marker in FULL_SIZE_LINES.values()
    ]
    figure.legend(handles=handles, loc="lower center", ncols=3, frameon=False, fontsize=8.5)
    first = found[0]
    figure.suptitle(
        f"{where(first)}, {first['threads']} thread(s), torch {first['torch']}",
        fontsize=8.5,
        color="#444444",
        y=0.985,
    )
    figure.tight_layout(rect=(0, 0.13, 1, 1))
    figure.savefig(picture, dpi=150)
    plt.close(figure)


def ratios(
    rows: Path,
    picture: Path,
    case: str,
    marks: dict[str, tuple[str, str, str]],
    title: Callable[[dict[str, Any]], str],
) -> None:
    """Time of the candidates over the library's, a line for each problem."""
    found = read(rows)
    if not found:
        raise SystemExit(f"{rows} holds no rows to draw: run bench/run.py {case}")
    points: dict[str, dict[str, dict[str, Any]]] = {}
    for row in found:
        points.setdefault(title(row), {})[row["candidate"]] = row
    height = 0.32 * len(points) + 1.7
    figure, panel = plt.subplots(figsize=(8.4, height))
    for y, point in enumerate(points.values()):
        own = point["library"]["p50_ms"]
        panel.text(
            1.01,
            y,
            f"{own:,.3g} ms",
            transform=panel.get_yaxis_transform(),
            va="center",
            fontsize=8,
        )
        for name, (_, color, marker) in marks.items():
            if name in point:
                low, middle, high = (point[name][f"{q}_ms"] / own for q in ("p20", "p50", "p80"))
                panel.errorbar(
                    middle,
                    y,
                    xerr=[[middle - low], [high - middle]],
                    color=color,
                    marker=marker,
                    markersize=5,
                    elinewidth=1,
                )
    panel.axvline(1.0, color="#000000", linewidth=1.2)
    panel.set_xscale("log")
    panel.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
    panel.minorticks_off()
    panel.set_yticks(range(len(points)), list(points), fontsize=8)
    panel.set_ylim(len(points) - 0.4, -0.6)
    panel.grid(axis="x", color="#dddddd", linewidth=0.6)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
    panel.set_xlabel("time over realera_fast's (its milliseconds on the right); right of 1: slower")
    handles = [
        Line2D([], [], color=color, marker=marker, linestyle="", label=label)
        for name, (label, color, marker) in marks.items()
        if any(name in point for point in points.values())
    ]
    columns = 3 if len(handles) == 3 else 2
    figure.legend(handles=handles, loc="upper center", ncols=columns, frameon=False, fontsize=8.5)
    first = found[0]
    panel.set_title(
        f"{where(first)}, {first['threads']} thread(s), torch {first['torch']}; "
        "medians, p20 to p80",
        fontsize=8.5,
        color="#444444",
    )
    lines = -(-len(handles) // columns)
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.22 * (lines + 0.5) / height))
    figure.savefig(picture, dpi=150)
    plt.close(figure)


def matrices(found: list[dict[str, Any]], shape: str) -> int:
    return next(row["matrices"] for row in found if row["shape"] == shape)


def draw(panel: Axes, found: list[dict[str, Any]]) -> None:
    def scaled(row: dict[str, Any], field: str) -> float:
        return row[field] * row["matrices"] / row["matrices_measured"]

    for name, (_, color, marker) in LINES.items():
        own = sorted((r for r in found if r["candidate"] == name), key=lambda r: r["concepts"])
        x = [row["concepts"] for row in own]
        y = [scaled(row, "p50_ms") for row in own]
        width = 2.2 if name == "library" else 1.4
        panel.plot(x, y, color=color, linewidth=width, zorder=3 if name == "library" else 2)
        for row, a, b in zip(own, x, y, strict=True):
            whole = row["matrices_measured"] == row["matrices"]
            panel.errorbar(
                a,
                b,
                yerr=[[b - scaled(row, "p20_ms")], [scaled(row, "p80_ms") - b]],
                color=color,
                marker=marker,
                markersize=5,
                elinewidth=1,
                markerfacecolor=color if whole else "white",
                zorder=4,
            )
        if name == "library":
            panel.plot(
                x,
                [scaled(row, "floor_ms") for row in own],
                color="#777777",
                linestyle="--",
                linewidth=1.2,
                zorder=1,
            )
    panel.set_xscale("log")
    panel.set_yscale("log")
    panel.xaxis.set_major_locator(LogLocator(numticks=9))
    panel.yaxis.set_major_locator(LogLocator(numticks=12))
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: duration(value)))
    panel.minorticks_off()
    panel.grid(color="#dddddd", linewidth=0.6)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
    panel.tick_params(labelsize=8.5)


def duration(milliseconds: float) -> str:
    if milliseconds >= 1000:
        return f"{milliseconds / 1000:,g} s"
    return f"{milliseconds:g} ms"
