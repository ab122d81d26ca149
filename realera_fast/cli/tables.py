"""What commands print: columns, names, JSON."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import typer

from realera_fast import __version__

if TYPE_CHECKING:
    from realera_fast.config import EraseConfig
    from realera_fast.dry_run import Preview
    from realera_fast.erasure import Erasure
    from realera_fast.ops import Verdict
    from realera_fast.text import Concept


def joined_names(erasure: Erasure) -> str:
    return ", ".join(concept.target for concept in erasure.concepts) or "nothing"


def json_text(values: Mapping[str, Any]) -> str:
    return json.dumps(values, indent=1, default=str) + "\n"


def summary(erasure: Erasure) -> str:
    """The report's words that a user named, and one line about the solve."""
    report = erasure.report
    lines = [("word", "role", "becomes", "moved", "drift")]
    for word in report.get("words", ()):
        if word["role"] in ("neighbor", "vocabulary"):
            continue
        anchor = "-" if word["anchor"] is None else word["anchor"] or "(nothing)"
        moved = "-" if word["moved"] is None else f"{word['moved']:.0%}"
        drift = "-" if word["drift"] is None else f"{word['drift']:.2f}"
        lines.append((word["word"], word["role"], anchor, moved, drift))
    text = [columns(lines, right=(3, 4))]
    for target, words in report.get("neighbors", {}).items():
        if words:
            more = f" and {len(words) - 8} more" if len(words) > 8 else ""
            text.append(f"neighbors of {target}: {', '.join(words[:8])}{more}")
    solve = report.get("solve", {})
    values = (report.get("scales") or {}).get("values")
    if values:
        chosen = ", ".join(
            f"{name.removeprefix('value_')} {values[name]:g}"
            for name in ("value_ridge", "value_guidance", "value_neighbors")
        )
        text.append(f"solve: outputs of value projections, {chosen}")
    elif solve:
        text.append(
            f"solve: {solve['method']}, rank {solve['rank']}, condition {solve['condition']:.1e}, "
            f"residual ratio {solve['residual_ratio']:.2g}"
        )
    text += list(_robustness(report))
    seconds = report.get("seconds", {})
    if seconds:
        parts = ", ".join(f"{name} {value:.1f}" for name, value in seconds.items())
        text.append(f"{sum(seconds.values()):.1f} seconds: {parts}")
    return "\n".join(text)


def _robustness(report: Mapping[str, Any]) -> Iterator[str]:
    """How much of the concepts is left in held-back pictures, and under the check's attack."""
    found = report.get("alignment", {})
    for key, name in (("closed_form", "the closed form"), ("aligned", "noise alignment")):
        if score := found.get(key):
            left = (score["target"] + score["neighbor"]) / 2
            yield f"left after {name}: {left:.0%}, under attack {score['worst']:.0%}"
    if found.get("closed_form") and not report.get("attacks"):
        yield "--preset strict is harder to attack, in less time, and takes more of a scene with it"


def echo_file(described: Mapping[str, Any]) -> str:
    """What `info FILE` prints."""
    from realera_fast.erasure import report
    from realera_fast.text import Concept

    concepts = described["concepts"]
    provenance = described.get("provenance", {})
    lines = [("", "erased", "also", "becomes", "kind")]
    for value in concepts[:50]:
        concept = Concept.from_dict(value)
        lines.append(
            (
                "",
                concept.target,
                ", ".join(concept.synonyms) or "-",
                report.anchor_name(concept, described["anchors"]),
                concept.kind,
            )
        )
    text = [f"{described['file']}: {described['holds']}", columns(lines)]
    if len(concepts) > 50:
        text.append(f"and {len(concepts) - 50} more")
    text.append("")
    rows = [("", "seed", str(provenance.get("seed", "-")))]
    rows += [("", name, str(v)) for name, v in provenance.get("versions", {}).items()]
    rows += [("", f"base {name}", v) for name, v in provenance.get("base_hashes", {}).items()]
    solve = described.get("solve") or {}
    rows += [
        ("", f"solve {k}", f"{v:.3g}" if isinstance(v, float) else str(v))
        for k, v in solve.items()
        if not isinstance(v, dict)
    ]
    if described.get("report_sha256"):
        rows.append(("", "report SHA-256", described["report_sha256"]))
    text.append(columns(rows))
    history = provenance.get("history", [])
    if history:
        text.append("\nhistory, oldest first")
        text.append(
            columns(
                [
                    (
                        "",
                        entry["action"],
                        ", ".join(entry["concepts"][:10]),
                        entry["fingerprint"][:16],
                    )
                    for entry in history
                ]
            )
        )
    return "\n".join(text)


def echo_plan(
    pipe: Any,
    concepts: Sequence[Concept],
    preserve: Sequence[str],
    config: EraseConfig,
    out: Path,
    wanted: Sequence[str],
    *,
    target: Literal["weights", "adapter"],
) -> None:
    from realera_fast.mining import can_be_drawn
    from realera_fast.models import (
        components_of,
        dense_weight,
        family_of,
        projections,
        text_streams,
        why_not_aligned,
    )

    parts = components_of(pipe)
    layers = projections(parts.model, target=target)
    text = text_streams(parts.model, parts.text_encoders, parts.tokenizers)["sequence"][0]
    weight = dense_weight(next(iter(layers.values())))
    dtype = str(weight.dtype).removeprefix("torch.")
    typer.echo(f"would edit {len(layers)} projections of {type(parts.model).__name__} ({dtype})")
    lines = [("", "word", "kind", "becomes", "tokens")]
    fixed = config.pairs.anchors == "mean"
    for concept in concepts:
        for word in concept.words:
            tokens = str(len(text.token_ids(word)))
            # The preview below says what the model chooses.
            becomes = concept.anchor_name if concept.anchor is not None or fixed else "-"
            lines.append(("", word, concept.kind, becomes, tokens))
    typer.echo(columns(lines, right=(4,)))
    if preserve:
        typer.echo(f"would preserve {', '.join(preserve)}")
    encoders = parts.text_encoders
    count = len(encoders) if isinstance(encoders, tuple | list) else 1
    family = family_of(parts.model, count)
    for sentence in family.explained():
        typer.echo(f"would read {sentence}")
    not_aligned = why_not_aligned(parts.model, family, config.alignment.latent_size, target)
    names = [c.target for c in concepts if c.kind == "explicit"] if family.aligned else []
    if names and config.mining.member_words and can_be_drawn(parts.model, config.alignment):
        typer.echo(
            f"would draw up to {config.mining.member_words} words each to find the members of "
            f"{', '.join(names)}"
        )
    stage = "without"
    if config.alignment.enabled:
        stage = f"without ({not_aligned})" if not_aligned else "with"
    typer.echo(
        f"would mine neighbors by {config.mining.mode}, {stage} noise alignment, seed {config.seed}"
    )
    typer.echo(f"would write {', '.join(wanted)} and a report to {out}")


def words_text(found: Preview) -> str:
    """Which words would go and which stay, concept by concept."""
    lines = []
    for target, words in found.neighbors.items():
        anchor = found.anchors.get(target)
        becomes = f" becomes {' or '.join(anchor.words)}, {anchor.why}" if anchor else ""
        lines.append(f"{target}{becomes}")
        by_source: dict[str, list[str]] = {}
        for word in words:
            by_source.setdefault(found.sources.get(word, "token"), []).append(word)
        for source, some in by_source.items():
            lines.append(f"  would go, {_WHY.get(source, source)}: {', '.join(some)}")
        if not words:
            lines.append("  no other word would go with it")
        for what, others in (
            ("would stay", found.relatives.get(target, ())),
            ("near, and would stay", found.beyond.get(target, ())),
            ("in doubt, and would stay", found.borderline.get(target, ())),
        ):
            if others:
                lines.append(f"  {what}: {', '.join(others)}")
    line = found.line
    lines += [
        f"least cosine of a neighbor: {line.unknown:.2f}, of a related word {line.related:.2f}, by "
        + ("pairs of the lexicon" if line.source == "lexicon" else "the words' own distances"),
        "strike out with --spare WORD, add with --synonym WORD",
    ]
    return "\n".join(lines)


_WHY = {
    "inflection": "forms of the name",
    "lexicon": "by the lexicon",
    "token": "as the model sees them",
    "member": "members",
    "drawn": "drawn alike",
}


def system_info() -> dict[str, Any]:
    import torch

    from realera_fast import ops

    versions: dict[str, str | None] = {
        "realera_fast": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }
    for package in ("triton", "diffusers", "transformers", "peft", "accelerate", "safetensors"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    devices = [
        {
            "name": "cpu",
            "description": f"{platform.machine()}, {torch.get_num_threads()} threads, "
            f"{torch.backends.cpu.get_cpu_capability()}",
        }
    ]
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        found = torch.cuda.get_device_properties(index)
        devices.append(
            {
                "name": f"cuda:{index}",
                "description": f"{found.name}, {found.total_memory / 2**30:.0f} GiB, "
                f"compute capability {found.major}.{found.minor}",
            }
        )
    return {"versions": versions, "devices": devices, "operations": ops.implementations()}


def checks_table(checked: Sequence[Verdict]) -> str:
    """What `info --check` found, a line for each kernel, device and dtype."""
    lines = [("", "operation", "device", "dtype", "kernel", "error", "allowed", "ms", "")]
    lines += [
        (
            "",
            v.op,
            v.device,
            v.dtype,
            v.implementation,
            f"{v.error:.1e}",
            f"{v.limit:.1e}",
            f"{v.milliseconds:.0f}",
            "agrees" if v.agrees else v.what_differed(),
        )
        for v in checked
    ]
    return columns(lines, right=(5, 6, 7)) if checked else "  no kernels: plain PyTorch serves all"


def columns(lines: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """Lines of cells, aligned; what a file brings in can't steer the terminal."""
    lines = [
        [repr(c)[1:-1] if re.search(r"[\x00-\x1f\x7f-\x9f]", c) else c for c in line]
        for line in lines
    ]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
