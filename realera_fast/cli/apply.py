"""`realera-fast apply`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from realera_fast.cli.inputs import check_places
from realera_fast.cli.options import (
    Base,
    Debug,
    Device,
    Dtype,
    Force,
    Model,
    Out,
    Quiet,
    Variant,
    check_placement,
)
from realera_fast.cli.output import check_space, output_folder
from realera_fast.cli.program import app, start_logging


@app.command(short_help="Apply saved deltas to a model.")
def apply(
    model: Model,
    deltas: Annotated[
        list[Path],
        typer.Argument(
            metavar="DELTA...",
            help="Files that 'erase' wrote, in the order in which they were made.",
            show_default=False,
        ),
    ],
    out: Out,
    rebase: Annotated[
        bool,
        typer.Option(
            "--rebase",
            help="Apply deltas to other weights than they were made on, as when an earlier one is "
            "left out. A closed form of the text is then what erasing there would give.",
        ),
    ] = False,
    dtype: Dtype = "fp32",
    device: Device = None,
    variant: Variant = None,
    base: Base = None,
    force: Force = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Apply saved deltas to a model and write the edited pipeline to DIR.

    A delta must have been made from the weights that it meets: the base model's, or those that the
    deltas before it left. To withdraw an earlier one, leave it out and pass --rebase.

    \b
    Examples:
      realera-fast apply ./sd14 out/no-cat/erasure.safetensors -o out/sd14-no-cat
      realera-fast apply ./sd14 brands.safetensors faces.safetensors -o out/both
      realera-fast apply ./sd14 faces.safetensors --rebase -o out/sd14-no-faces
    """
    check_placement(dtype, device)
    check_places(model, base, out, force, deltas)
    from realera_fast.cli.loading import load_pipeline
    from realera_fast.erasure import Erasure
    from realera_fast.models import component_name, components_of

    erasures = [Erasure.load(delta) for delta in deltas]
    start_logging(quiet)
    with output_folder(out, force) as folder:
        pipe = load_pipeline(model, dtype=dtype, device=device, variant=variant, base=base)
        check_space(pipe, folder)
        edited = components_of(pipe).model
        for erasure in erasures:
            last = erasure.rebase(edited) if rebase else erasure
            last.apply_(edited)
        pipe.save_pretrained(folder, safe_serialization=True)
        last.annotate(folder / component_name(pipe))
    names = ", ".join(repr(c.target) for erasure in erasures for c in erasure.concepts)
    typer.echo(f"wrote a pipeline without {names or 'any change'} to {out}")
