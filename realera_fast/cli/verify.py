"""`realera-fast verify`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from realera_fast.cli.inputs import Asked, check_fid, check_places
from realera_fast.cli.options import (
    Base,
    Debug,
    Delta,
    Device,
    Dtype,
    Force,
    Model,
    Out,
    Quiet,
    Variant,
    check_placement,
    seeds_of,
)
from realera_fast.cli.output import output_folder
from realera_fast.cli.program import app, start_logging
from realera_fast.cli.tables import columns, joined_names, json_text

if TYPE_CHECKING:
    from realera_fast.cli.evaluators import Evaluators
    from realera_fast.erasure import Erasure
    from realera_fast.evaluation import Row, Verification


@app.command()
def verify(
    model: Model,
    delta: Delta,
    out: Out,
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            "--prompt",
            "-p",
            metavar="TEXT",
            help="Draw this; may be given several times (default: every erased word).",
        ),
    ] = None,
    untouched: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT", help="Draw this too: it should not change; may be given several times."
        ),
    ] = None,
    seeds: Annotated[
        str, typer.Option(metavar="LIST", help="Seeds, the same for every prompt.")
    ] = "0,1,2",
    steps: Annotated[
        int | None, typer.Option(metavar="N", help="Denoising steps (default: 25).", min=1)
    ] = None,
    guidance: Annotated[
        float | None,
        typer.Option(metavar="X", help="Classifier-free guidance (default: 7.5).", min=0.0),
    ] = None,
    height: Annotated[int | None, typer.Option(metavar="N", help="In pixels.", min=8)] = None,
    width: Annotated[int | None, typer.Option(metavar="N", help="In pixels.", min=8)] = None,
    batch_size: Annotated[
        int, typer.Option(metavar="N", help="Pictures drawn together.", min=1)
    ] = 4,
    clip: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="A folder with a CLIP model (transformers, safetensors): scores and judges.",
            show_default=False,
        ),
    ] = None,
    label: Annotated[
        list[str] | None,
        typer.Option(
            metavar="WORDS",
            help="What CLIP chooses from; may be given several times (default: what was erased, "
            "and the words that were watched).",
        ),
    ] = None,
    detector: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="nudenet (body parts, package nudenet), or MODULE:NAME, a Python callable from "
            "a picture to what it shows; may be given several times.",
        ),
    ] = None,
    fid: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Reference pictures: Fréchet distances of what should stay, by the features of "
            "--clip or --fid-weights.",
            show_default=False,
        ),
    ] = None,
    fid_weights: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="InceptionV3 as torch-fidelity publishes it, for FID proper.",
            show_default=False,
        ),
    ] = None,
    dtype: Dtype = "fp32",
    device: Device = None,
    variant: Variant = None,
    base: Base = None,
    force: Force = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Draw pictures before and after a delta, from the same seeds.

    MODEL is the model the delta was made from. Writes before_after.png, report.html,
    report.json, the pictures, and rows.csv with a line for each prompt and seed into DIR.

    Without --prompt it draws what was erased, words just outside its neighborhood, and words
    that moved least.

    \b
    Examples:
      realera-fast verify embedded out/no-cat/erasure.safetensors \\
          -p "a photo of a cat" --untouched "a photo of a dog" -o out/check
      realera-fast verify ./sd14 out/no-cat/erasure.safetensors --clip ./clip \\
          --label cat --label dog --detector mypackage.nudity:detect -o out/check
      realera-fast verify ./sd14 out/no-van-gogh/erasure.safetensors \\
          -p "Starry night by Van Gogh" --seeds 1,2,3 --device cuda -o out/check
    """
    check_placement(dtype, device)
    numbers = seeds_of(seeds)
    check_places(model, base, out, force, [delta])
    check_fid(fid, fid_weights, clip)
    from realera_fast.cli.evaluators import check_stays, evaluators_of
    from realera_fast.cli.loading import load_pipeline
    from realera_fast.erasure import Erasure
    from realera_fast.evaluation import verify as verify_pictures

    erasure = Erasure.load(delta)
    if fid is not None:
        check_stays(prompt or None, untouched or (), len(numbers), erasure)
    start_logging(quiet)
    who = evaluators_of(
        Asked(model, device, clip, label or (), detector or (), fid, fid_weights), erasure
    )
    sampling: dict[str, Any] = {"steps": 25, "guidance": 7.5}
    if model == "embedded":
        from realera_fast import embedded

        table = embedded.words().sampling
        sampling = {"steps": table["steps"], "guidance": table["guidance_scale"]}
        height, width = height or table.get("height"), width or table.get("width")
    sampling |= {k: v for k, v in (("steps", steps), ("guidance", guidance)) if v is not None}
    with output_folder(out, force) as folder:
        pipe = load_pipeline(model, dtype=dtype, device=device, variant=variant, base=base)
        found = verify_pictures(
            pipe,
            erasure,
            prompt or None,
            untouched=untouched or (),
            seeds=numbers,
            height=height,
            width=width,
            batch_size=batch_size,
            judge=who.judge,
            scorer=who.scorer,
            detectors=who.detectors,
            progress=False if quiet else None,
            **sampling,
        )
        warnings = _write(folder, found, erasure, who, model)
    for warning in warnings:
        typer.echo(f"warning: {warning}", err=True)
    typer.echo(_changes(found.rows))
    typer.echo(f"\nwrote before_after.png, report.html, report.json, rows.csv to {out}")


def _write(
    folder: Path, found: Verification, erasure: Erasure, who: Evaluators, model: str
) -> list[str]:
    """Writes everything; what a reader must not overlook comes back."""
    from realera_fast.evaluation import before_after_grid, write_html, write_rows
    from realera_fast.evaluation import numbers as numbers_of
    from realera_fast.runtime import write_atomically

    distances = who.reference and who.reference.distances(found.rows)
    warnings = [*found.warnings, *(distances.warnings() if distances else ())]
    title = f"Before and after: {joined_names(erasure)}"
    write_rows(folder, found, erasure)
    before_after_grid(found.rows, folder / "before_after.png", title=title)
    evaluators = {**found.evaluators, **({"fid": distances.model} if distances else {})}
    write_html(
        folder / "report.html",
        title=title,
        summary=f"{model}, each pair of pictures from the same seed.",
        rows=found.rows,
        warnings=[*erasure.report.get("warnings", ()), *warnings],
        tables=[numbers_of(found.rows), *([distances.table()] if distances else ())],
        report=erasure.report,
        provenance={
            **erasure.provenance,
            "sampling": found.settings,
            "evaluators": evaluators,
        },
    )
    outcome = found.to_dict() | {
        "evaluators": evaluators,
        "warnings": warnings,
        "provenance": dict(erasure.provenance),
    }
    if distances:
        outcome["fid"] = distances.to_dict()
    write_atomically(folder / "report.json", json_text(outcome).encode())
    return warnings


def _changes(rows: Sequence[Row]) -> str:
    lines = [("change of pixels", "of text", "group", "prompt")]
    lines += [
        (
            f"{100 * row.change:.1f} %",
            f"{100 * (row.text_change or 0):.1f} %",
            row.group,
            row.prompt,
        )
        for row in rows
    ]
    return columns(lines, right=(0, 1))
