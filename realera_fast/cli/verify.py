"""`realera-fast verify`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from realera_fast.cli.inputs import check_places
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
    usage_error,
)
from realera_fast.cli.output import output_folder
from realera_fast.cli.program import app, start_logging
from realera_fast.cli.tables import columns, joined_names, json_text

if TYPE_CHECKING:
    from realera_fast.evaluation import Row


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
            metavar="MODULE:NAME",
            help="A Python callable from a picture to what it shows; may be given several times.",
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

    MODEL is the model the delta was made from. Writes before_after.png, report.html and
    report.json into DIR.

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
    from realera_fast import embedded
    from realera_fast.cli.loading import find_device, load_pipeline
    from realera_fast.erasure import Erasure
    from realera_fast.evaluation import ClipJudge, before_after_grid, find_detector, write_html
    from realera_fast.evaluation import numbers as numbers_of
    from realera_fast.evaluation import verify as verify_pictures
    from realera_fast.runtime import write_atomically

    erasure = Erasure.load(delta)
    try:
        detectors = {name: find_detector(name) for name in detector or ()}
    except ValueError as error:
        raise usage_error("--detector", str(error)) from error
    start_logging(quiet)
    judge: Any = None
    if clip is not None:
        watched = [word["word"] for word in erasure.report.get("words", ())]
        named = [word for concept in erasure.concepts for word in concept.words]
        labels = label or list(dict.fromkeys([*named, *watched]))
        judge = ClipJudge.from_pretrained(clip, device=find_device(device), things=labels)
    elif model == "embedded":
        judge = embedded.load_judge()
    sampling: dict[str, Any] = {"steps": 25, "guidance": 7.5}
    if model == "embedded":
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
            judge=judge,
            scorer=judge if clip is not None else None,
            detectors=detectors,
            progress=False if quiet else None,
            **sampling,
        )
        title = f"Before and after: {joined_names(erasure)}"
        before_after_grid(found.rows, folder / "before_after.png", title=title)
        warnings = [*erasure.report.get("warnings", ()), *found.warnings]
        write_html(
            folder / "report.html",
            title=title,
            summary=f"{model}, each pair of pictures from the same seed.",
            rows=found.rows,
            warnings=warnings,
            tables=[numbers_of(found.rows)],
            report=erasure.report,
            provenance={
                **erasure.provenance,
                "sampling": found.settings,
                "evaluators": found.evaluators,
            },
        )
        outcome = found.to_dict() | {"provenance": dict(erasure.provenance)}
        write_atomically(folder / "report.json", json_text(outcome).encode())
    for warning in found.warnings:
        typer.echo(f"warning: {warning}", err=True)
    typer.echo(_changes(found.rows))
    typer.echo(f"\nwrote before_after.png, report.html, report.json to {out}")


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
