"""`realera-fast demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from realera_fast.cli.inputs import read_config, settings_of
from realera_fast.cli.options import ConfigFile, Debug, Device, Mining, NoAlign, Quiet
from realera_fast.cli.program import app, start_logging


@app.command(short_help="Erase an object and a style from the model that ships here.")
def demo(
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Output folder.")] = Path(
        "out/demo"
    ),
    thing: Annotated[str, typer.Option(metavar="WORD", help="The object to erase.")] = "dog",
    style: Annotated[str, typer.Option(metavar="WORD", help="The style to erase.")] = "mosaic",
    mining: Mining = None,
    no_align: NoAlign = False,
    seed: Annotated[
        int | None, typer.Option(metavar="N", help="Seed of the eraser.", min=0)
    ] = None,
    config: ConfigFile = None,
    device: Device = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Erase an object and a style from the model that ships with the library.

    Draws not quite 200 pictures before and after, lets a classifier judge them, and writes
    before_after.png, report.html, report.json and erasure.safetensors into DIR, replacing older
    ones. Takes a minute or a few on a CPU.

    \b
    Examples:
      realera-fast demo
      realera-fast demo --thing dog --style blueprint --no-align --out out/dog
    """
    values = read_config(config)
    if not quiet:
        # Said before the imports below, which take seconds.
        typer.echo(
            f"demo: erasing {thing!r} and the style {style!r} from the embedded model; "
            "a minute or a few on a CPU",
            err=True,
        )
    from realera_fast.cli.demo_job import run_demo
    from realera_fast.cli.demo_plan import ERASE_CONFIG, DemoConfig
    from realera_fast.cli.demo_report import FILES
    from realera_fast.cli.loading import find_device

    settings = settings_of(
        values, config, mining=mining, no_align=no_align, seed=seed, defaults=ERASE_CONFIG
    )
    start_logging(quiet)
    result = run_demo(
        out,
        DemoConfig(thing=thing, style=style),
        erase_config=settings,
        device=find_device(device),
        progress=False if quiet else None,
    )
    typer.echo(result.text())
    typer.echo(f"\n{sum(result.seconds.values()):.0f} seconds: ", nl=False)
    typer.echo(", ".join(f"{name} {value:.1f}" for name, value in result.seconds.items()))
    width = max(map(len, FILES))
    about = (
        "pictures, same seeds",
        "everything on one page",
        "all numbers",
        "the delta",
        "its card",
    )
    for name, text in zip(FILES, about, strict=True):
        typer.echo(f"  {result.folder / name!s:<{width + len(str(result.folder)) + 1}}  {text}")
