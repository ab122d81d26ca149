"""Every published number, from committed rows: writes the tables between README's markers.

python bench/report.py            # rewrite README.md
python bench/report.py --check    # exit 1 if README.md is not what the rows say
"""

import argparse
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import tables
from quality_page import summary_lines
from tables import ROOT, rows, table

START, END = "<!-- results -->", "<!-- /results -->"


def model_lines() -> list[str]:
    path = tables.RESULTS / "embedded_model.json"
    if not path.exists():
        return []
    found = json.loads(path.read_text(encoding="utf-8"))
    held_out, sampling = found["judge_held_out"], found["sampling"]
    measures = {
        "judge on held-out renderings, things": held_out["renderings"]["things"],
        "judge on held-out renderings, styles": held_out["renderings"]["styles"],
        f"pictures of things ({found['things']['pictures']})": found["things"]["accuracy"],
        f"pictures of synonyms ({found['synonyms']['pictures']})": found["synonyms"]["accuracy"],
        f"pictures in styles ({found['styles']['pictures']})": found["styles"]["accuracy"],
    }
    body = [[name, f"{100 * value:.1f}"] for name, value in measures.items()]
    return [
        f"The embedded model before anything is erased, {sampling['steps']} {sampling['sampler']} "
        f"steps, guidance {sampling['guidance_scale']}, recognized by its judge, percent:",
        "",
        *table(("measure", "accuracy"), body),
        "",
    ]


def by_point(
    found: Sequence[Mapping[str, Any]], fields: Sequence[str], case: str
) -> dict[tuple[Any, ...], dict[str, Mapping[str, Any]]]:
    """Rows of one run by the fields that tell its points apart, then by candidate."""
    about = ("commit", "dirty", "device", "cpu", "threads", "torch", "date")
    made = {tuple(row[name] for name in about) for row in found}
    points: dict[tuple[Any, ...], dict[str, Mapping[str, Any]]] = {}
    for row in found:
        points.setdefault(tuple(row[name] for name in fields), {})[row["candidate"]] = row
    repeated = sum(len(point) for point in points.values()) != len(found)
    if len(made) > 1 or repeated or any("library" not in point for point in points.values()):
        raise SystemExit(
            f"{case}.jsonl mixes runs, repeats rows or misses some: run bench/run.py {case} anew"
        )
    return points


def closed_form_lines() -> list[str]:
    """Time of the closed form beside its floor and the baselines."""
    found = [row for row in rows("closed_form.jsonl") if row["stage"] == "total"]
    if not found:
        return []
    points = by_point(found, ("shape", "dtype", "rows", "concepts"), "closed_form")

    def measured(row: Mapping[str, Any]) -> str:
        if row["matrices_measured"] == row["matrices"]:
            return ""
        return f" ({row['matrices_measured']} of {row['matrices']})"

    def times(point: Mapping[str, Mapping[str, Any]], name: str) -> str:
        if name not in point:
            return "–"
        each, own = (
            row["p50_ms"] / row["matrices_measured"] for row in (point[name], point["library"])
        )
        factor = each / own
        digits = 0 if factor >= 100 else 1 if factor >= 10 else 2
        return f"{factor:,.{digits}f}x{measured(point[name])}"

    body = []
    for (shape, dtype, count, concepts), point in points.items():
        own = point["library"]
        each = count // concepts
        body.append(
            [
                shape if dtype == "float32" else f"{shape}, {dtype}",
                f"{concepts:,}" if each == 1 else f"{concepts:,} ({each:,} rows each)",
                f"{own['p50_ms']:,.1f}{measured(own)}",
                f"{own['p50_ms'] / own['floor_ms']:.2f}",
                *(times(point, name) for name in ("uce", "mace", "batched", "composition")),
            ]
        )
    first = found[0]
    where = first["cpu"] if first["device"] == "cpu" else first["device"]
    return [
        f"From rows in memory to updated weights, medians on {where}, {first['threads']} "
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


def times(point: Mapping[str, Mapping[str, Any]], name: str) -> str:
    """How many times as long as the library a candidate takes."""
    if name not in point:
        return "–"
    return f"{point[name]['p50_ms'] / point['library']['p50_ms']:.2f}x"


PERTURB = {
    "rows": "draw rows",
    "project": "project",
    "lora": "project, LoRA rank 4",
    "backward": "the same with LoRA gradients",
    "accumulate": "normal equations",
}


def perturb_lines() -> list[str]:
    """Time of drawing, projecting and summing neighbors beside the published way."""
    found = rows("perturb.jsonl")
    if not found:
        return []
    fields = ("operation", "shape", "concepts", "samples", "dtype")
    points = by_point(found, fields, "perturb")

    body = [
        [
            PERTURB[operation],
            shape if dtype == "float32" else f"{shape}, {dtype}",
            f"{concepts:,} x {samples:,}",
            f"{point['library']['p50_ms']:,.2f}",
            times(point, "eager"),
            times(point, "compiled"),
            times(point, "ceiling"),
        ]
        for (operation, shape, concepts, samples, dtype), point in points.items()
    ]
    first = found[0]
    where = first["cpu"] if first["device"] == "cpu" else first["device"]
    return [
        f"Neighbors of 77-token prompts, medians on {where}, {first['threads']} thread(s), torch "
        f"{first['torch']}, commit {first['commit']}. The last columns say how many times as long "
        "as the library the others take: what published codes do in eager PyTorch (randn, scale, "
        "add, then a product for each layer; without a test whether samples lie in the region), "
        "torch.compile of the definition, and the write, product or sum alone, which nothing gets "
        "below. –: not measured; the compiled definition is measured on CUDA only.",
        "",
        *table(
            ("operation", "model", "concepts x samples", "ms", "eager", "compiled", "ceiling"), body
        ),
        "",
    ]


ALIGNMENT = {
    "step": "optimizer step",
    "train": "the same, all of training in it",
    "image": "picture, fused",
}


def alignment_lines() -> list[str]:
    """Time of the noise alignment beside a plain loop, and of pictures with `fuse`."""
    found = rows("alignment.jsonl")
    if not found:
        return []
    points = by_point(found, ("operation", "model", "dtype", "rows"), "alignment")

    others = ("plain", "plain compiled", "library compiled", "plain, new z_t")
    body = [
        [
            ALIGNMENT[operation],
            f"{model}, {dtype}",
            "–" if operation == "image" else f"{count}",
            f"{point['library']['p50_ms']:,.1f}",
            *(times(point, name) for name in others),
        ]
        for (operation, model, dtype, count), point in points.items()
    ]
    first = found[0]
    where = first["cpu"] if first["device"] == "cpu" else first["device"]
    return [
        f"Noise alignment, medians on {where}, {first['threads']} thread(s), torch "
        f"{first['torch']}, commit {first['commit']}. The last columns say how many times as long "
        "as the library the others take: a plain diffusers and peft loop of ours with two U-Nets, "
        "of the same batch, terms and z_t; both through torch.compile (compiling not counted); and "
        "the plain loop that denoises z_t anew for each step. Pictures are 20 guided steps without "
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
            ),
            body,
        ),
        "",
    ]


def full_size_lines() -> list[str]:
    """Stages of an erasure from Stable Diffusion 1.4 at full size."""
    found = rows("full_size.jsonl")
    if not found:
        return []
    body = [
        (
            f"{row['concepts']}",
            f"{row['words']}",
            row["dtype"],
            row["stage"],
            f"{row['seconds']:,.2f}",
            f"{row['peak_mb']:,}",
            f"{row['file_mb']:.1f}" if "file_mb" in row else "",
        )
        for row in found
    ]
    first = found[0]
    where = first["cpu"] if first["device"] == "cpu" else first["device"]
    return [
        f"One run on {where}, {first['threads']} thread(s), torch {first['torch']}, commit "
        f"{first['commit']}. Random weights of the real shapes; peak memory is that of the whole "
        "process (on a GPU: of its allocator), model included. No noise alignment.",
        "",
        *table(("concepts", "prior words", "dtype", "stage", "s", "peak MiB", "file MB"), body),
        "",
    ]


def entry_map_lines() -> list[str]:
    """Edits of models with joint attention, at the entry of the text or in each block."""
    found = rows("entry_maps.jsonl")
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
        "is in `bench/entry_maps.py`.",
        "",
        *table(("model", "edit", "erased", "kept", "tokens"), body),
        "",
    ]


def generated() -> str:
    lines = [*model_lines()]
    summary = summary_lines()
    if summary:
        lines += ["### How well it erases", "", *summary]
    closed_form = closed_form_lines()
    if closed_form:
        lines += ["### Closed form", "", *closed_form]
    perturb = perturb_lines()
    if perturb:
        lines += ["### Neighbors", "", *perturb]
    alignment = alignment_lines()
    if alignment:
        lines += ["### Noise alignment", "", *alignment]
    for title, part in (
        ("Stable Diffusion 1.4 at full size", full_size_lines()),
        ("Where to edit models with joint attention", entry_map_lines()),
    ):
        if part:
            lines += [f"### {title}", "", *part]
    return "\n".join(lines).strip()


def with_results(readme: str) -> str:
    head, _, rest = readme.partition(START)
    _, _, tail = rest.partition(END)
    return f"{head}{START}\n{generated()}\n{END}{tail}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    arguments = parser.parse_args()
    path = ROOT / "README.md"
    readme = path.read_text(encoding="utf-8")
    wanted = with_results(readme)
    if arguments.check:
        return int(readme != wanted)
    path.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
