"""Tables of times, and of what was measured beside them."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from harness.points import Candidates, Key, by_point, times
from harness.provenance import where
from harness.rows import committed
from harness.tables import DEFAULT, table


def points_of(
    found: Sequence[Mapping[str, Any]], fields: Sequence[str], case: str
) -> dict[Key, Candidates]:
    """Rows by point and candidate; refused unless they are whole and of one run."""
    about = ("commit", "dirty", "device", "cpu", "threads", "torch", "date")
    made = {tuple(row[name] for name in about) for row in found}
    points = by_point(found, fields)
    repeated = sum(len(point) for point in points.values()) != len(found)
    if len(made) > 1 or repeated or any("library" not in point for point in points.values()):
        raise SystemExit(
            f"{case}.jsonl mixes runs, repeats rows or misses some: run bench/run.py {case} anew"
        )
    return points


def factor_of(point: Candidates, name: str) -> str:
    """How many times as long as the library a candidate takes."""
    value = times(point, name)
    return "–" if value is None else f"{value:.2f}x"


def closed_form_points() -> dict[Key, Candidates]:
    """The closed form's whole times by shape, dtype, rows and concepts."""
    found = [row for row in committed("closed_form.jsonl") if row["stage"] == "total"]
    return points_of(found, ("shape", "dtype", "rows", "concepts"), "closed_form")


def matrices_measured(row: Mapping[str, Any]) -> str:
    """Says so where not all matrices were measured."""
    if row["matrices_measured"] == row["matrices"]:
        return ""
    return f" ({row['matrices_measured']} of {row['matrices']})"


def factor_text(point: Candidates, name: str) -> str:
    """How many times as long as the library a candidate takes, to three digits."""
    value = times(point, name)
    if value is None:
        return "–"
    digits = 0 if value >= 100 else 1 if value >= 10 else 2
    return f"{value:,.{digits}f}x"


def closed_form_lines() -> list[str]:
    """Time of the closed form beside its floor and the baselines."""
    points = closed_form_points()
    if not points:
        return []

    def cell(point: Candidates, name: str) -> str:
        return factor_text(point, name) + (matrices_measured(point[name]) if name in point else "")

    body = []
    for (shape, dtype, count, concepts), point in points.items():
        own = point["library"]
        each = count // concepts
        body.append(
            [
                shape if dtype == "float32" else f"{shape}, {dtype}",
                f"{concepts:,}" if each == 1 else f"{concepts:,} ({each:,} rows each)",
                f"{own['p50_ms']:,.1f}{matrices_measured(own)}",
                f"{own['p50_ms'] / own['floor_ms']:.2f}",
                *(cell(point, name) for name in ("uce", "mace", "batched", "composition")),
            ]
        )
    first = next(iter(points.values()))["library"]
    return [
        f"From rows in memory to updated weights, medians on {where(first)}, {first['threads']} "
        f"thread(s), torch {first['torch']}, commit {first['commit']}; one row for each concept "
        "unless noted. The floor is what the measured GEMM and memory rates of the same run allow. "
        "The other columns say how many times as long a baseline takes for each matrix; where it "
        "was too slow for all, how many of the matrices were measured; – where one alone would "
        "have taken more than a minute. Baselines are ours, written from the papers. The loops and "
        "the batched solve compute in float32, as the published codes do; the library and the last "
        "column sum and solve in float64.",
        "",
        *table(
            (
                "model",
                "concepts",
                "ms",
                "x floor",
                "UCE loop",
                "MACE loop",
                "batched solve",
                "low rank in PyTorch",
            ),
            body,
        ),
        "",
    ]


PERTURB = {
    "rows": "draw rows",
    "project": "project",
    "lora": "project, LoRA rank 4",
    "backward": "the same with LoRA gradients",
    "accumulate": "normal equations",
}


def perturb_lines() -> list[str]:
    """Time of drawing, projecting and summing neighbors beside the published way."""
    found = committed("perturb.jsonl")
    if not found:
        return []
    fields = ("operation", "shape", "concepts", "samples", "dtype")
    points = points_of(found, fields, "perturb")

    body = [
        [
            PERTURB[operation],
            shape if dtype == "float32" else f"{shape}, {dtype}",
            f"{concepts:,} x {samples:,}",
            f"{point['library']['p50_ms']:,.2f}",
            *(factor_of(point, name) for name in ("eager", "compiled", "ceiling")),
        ]
        for (operation, shape, concepts, samples, dtype), point in points.items()
    ]
    first = found[0]
    return [
        f"Neighbors of 77-token prompts, medians on {where(first)}, {first['threads']} thread(s), "
        f"torch {first['torch']}, commit {first['commit']}. The last columns say how many times as "
        "long as the library the others take: what published codes do in eager PyTorch (randn, "
        "scale, add, then a product for each layer; without a test whether samples lie in the "
        "region), torch.compile of the definition, and the write, product or sum alone, which "
        "nothing gets below. –: not measured; the compiled definition is measured on CUDA only.",
        "",
        *table(
            ("operation", "model", "concepts x samples", "ms", "eager", "compiled", "ceiling"), body
        ),
        "",
    ]


ALIGNMENT = {
    "step": "optimizer step",
    "worst step": "the same on the worst neighbors",
    "train": "the same, all of training in it",
    "image": "picture, fused",
}


def alignment_lines() -> list[str]:
    """Time of the noise alignment beside a plain loop, and of pictures with `fuse`."""
    found = committed("alignment.jsonl")
    if not found:
        return []
    points = points_of(found, ("operation", "model", "dtype", "rows"), "alignment")

    others = ("plain", "plain compiled", "library compiled", "plain, new z_t")
    body = [
        [
            ALIGNMENT[operation],
            f"{model}, {dtype}",
            "–" if operation == "image" else f"{count}",
            f"{point['library']['p50_ms']:,.1f}",
            *(factor_of(point, name) for name in others),
            *(f"{point[name]['step_bytes'] / 2**20:,.0f}" for name in ("library", "plain")),
        ]
        for (operation, model, dtype, count), point in points.items()
    ]
    first = found[0]
    return [
        f"Noise alignment, medians on {where(first)}, {first['threads']} thread(s), torch "
        f"{first['torch']}, commit {first['commit']}. The last columns say how many times as long "
        "as the library the others take: a plain diffusers and peft loop of ours with two models, "
        "of the same batch, terms and z_t; both through torch.compile (compiling not counted); and "
        "the plain loop that denoises z_t anew for each step. MiB are what a run takes at its "
        "peak beside the weights. Pictures are 20 guided steps without "
        "the VAE, beside the same model unfused.",
        "",
        *table(
            (
                "operation",
                "model",
                "rows",
                "ms",
                "plain",
                "plain, compiled",
                "library, compiled",
                "plain, new z_t",
                "MiB",
                "plain, MiB",
            ),
            body,
        ),
        "",
    ]


def full_size_lines() -> list[str]:
    """Whole calls on models at full size, and the library's stages."""
    found = committed("full_size.jsonl")
    if not found:
        return []
    whole = [row for row in found if row["stage"] == "all"]
    counts = sorted({row["concepts"] for row in whole})
    body, staged = [], []
    lines: dict[tuple[str, str, str, str], dict[int, Mapping[str, Any]]] = {}
    for row in whole:
        key = (row["model"], row["dtype"], row["method"], row["call"])
        lines.setdefault(key, {})[row["concepts"]] = row
    for (model, dtype, method, call), line in lines.items():
        cells = [f"{line[n]['seconds']:,.1f}" if n in line else "–" for n in counts]
        peak = max(row["peak_mb"] for row in line.values())
        body.append([f"{model}, {dtype}", method, call, *cells, f"{peak:,}"])
    stages: dict[tuple[str, str, str, int], dict[str, Mapping[str, Any]]] = {}
    for row in found:
        if row["method"] == DEFAULT:
            key_of = (row["model"], row["dtype"], row["call"], row["concepts"])
            stages.setdefault(key_of, {})[row["stage"]] = row
    for (model, dtype, call, count), of in stages.items():
        seconds = [f"{of[name]['seconds']:,.1f}" for name in STAGES]
        sizes = [f"{of[name]['file_mb']:.1f}" for name in FILES]
        mined, peak = of["all"]["neighbors"], of["all"]["peak_mb"]
        start = [f"{model}, {dtype}", call, f"{count:,}", f"{mined:,}"]
        staged.append([*start, *seconds, f"{peak:,}", *sizes])
    first = found[0]
    commits = ", ".join(dict.fromkeys(row["commit"] for row in found))
    return [
        f"Seconds of whole calls on {where(first)}, {first['threads']} thread(s), torch "
        f"{first['torch']}, commit {commits}. Random weights of the real shapes, the "
        "whole text encoders, CLIP's tokenizer; peak memory is that of the process (on a GPU: of "
        "its allocator), model included. The library's closed form (`EraseConfig.fast()`): its "
        "first call with a text encoder reads the words, later ones find them on the disk. The "
        "baselines' whole scripts have their authors' settings; OCE reads the words that stay in "
        "every call anew. A dash: not measured, as it was expected to take minutes."
        + ("" if any(row["model"] == "FLUX" for row in found) else _NO_FLUX),
        "",
        *table(
            (
                "model",
                "method",
                "call",
                *(f"{n:,} concept{'s' if n > 1 else ''}" for n in counts),
                "peak MiB",
            ),
            body,
        ),
        "",
        "The library's stages in seconds, the words that were mined, and the files in MB:",
        "",
        *table(
            ("model", "call", "concepts", "mined", *STAGES, "peak MiB", *FILES),
            staged,
        ),
        "",
    ]


_NO_FLUX = (
    " FLUX was not measured: on a CPU its T5-XXL takes seconds for a prompt of 512 rows, and the "
    "prior alone was not read in four minutes of two cores (seen)."
)
STAGES = ("words", "prior", "mining", "equations", "closed form", "report", "edit and checks")
FILES = ("save", "save_lora", "save_weights")


def entry_map_lines() -> list[str]:
    """Edits of models with joint attention, at the entry of the text or in each block."""
    found = committed("entry_maps.jsonl")
    if not found:
        return []
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in found:
        groups.setdefault((row["name"], row["edit"]), []).append(row)

    def spread(values: Sequence[float]) -> str:
        return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"

    body = [
        [
            name,
            edit,
            *(spread([row[key] for row in part]) for key in ("erased", "kept")),
            # With an edited pooled vector this would show what the edit does to the anchor's.
            spread([row["tokens"] for row in part]) if edit in ("sequence", "blocks") else "",
        ]
        for (name, edit), part in groups.items()
    ]
    seeds = len({row["seed"] for row in found})
    return [
        "What is left of a concept's prediction, what others lose, and what is left where only the "
        "token sequence tells of the concept: 0 is best, 1 is no edit. Randomly initialized models "
        f"of the stock classes, {seeds} seeds, commit {found[0]['commit']}; what the numbers mean "
        "is in `bench/quality/entry_maps.py`.",
        "",
        *table(("model", "edit", "erased", "kept", "tokens"), body),
        "",
    ]
