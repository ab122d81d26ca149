"""`realera-fast info`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from realera_fast.cli.inputs import check_files
from realera_fast.cli.options import CommandError, Debug, usage_error
from realera_fast.cli.program import app
from realera_fast.cli.tables import checks_table, columns, echo_file, json_text, system_info


@app.command(short_help="Print what a file holds, or versions and devices.")
def info(
    file: Annotated[
        Path | None,
        typer.Argument(
            metavar="[FILE]",
            help="A file that this program wrote: a delta, an adapter, weights, a model.",
            show_default=False,
        ),
    ] = None,
    check: Annotated[
        bool,
        typer.Option(
            "--check",
            help="Hold every kernel against its definition; exit code 1 if one differs.",
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
    debug: Debug = False,
) -> None:
    """Print what was erased in a FILE, how, and on top of what; without one, versions, devices,
    and which implementation serves each operation.

    \b
    Examples:
      realera-fast info
      realera-fast info --check
      realera-fast info out/no-cat/erasure.safetensors
      realera-fast info out/no-cat/lora/pytorch_lora_weights.safetensors --json
    """
    if file is not None:
        if check:
            raise usage_error("--check", "is for the kernels of this machine; leave FILE out")
        check_files(file)
        from realera_fast.erasure import read_description

        described = read_description(file)
        typer.echo(json_text(described) if as_json else echo_file(described), nl=not as_json)
        return
    checked = None
    if check:
        from realera_fast import ops

        checked = ops.check_kernels()
    found = system_info()
    if checked is not None:
        found["checks"] = [{**asdict(verdict), "agrees": verdict.agrees} for verdict in checked]
    if as_json:
        typer.echo(json_text(found), nl=False)
    else:
        _echo_system(found)
        if checked is not None:
            typer.echo(f"\nchecks\n{checks_table(checked)}")
    differing = [f"{v.op} on {v.device}" for v in checked or () if not v.agrees]
    if differing:
        raise CommandError(
            f"kernels that differ from their definitions: {', '.join(dict.fromkeys(differing))}; "
            "plain PyTorch serves in their place"
        )


def _echo_system(found: dict[str, Any]) -> None:
    typer.echo("versions")
    typer.echo(columns([("", name, text or "-") for name, text in found["versions"].items()]))
    typer.echo("\ndevices")
    typer.echo(columns([("", d["name"], d["description"]) for d in found["devices"]]))
    typer.echo("\noperations")
    served = found["operations"]
    names = list(dict.fromkeys(device for entry in served.values() for device in entry))
    lines = [("", "", *names)]
    lines += [("", op, *(entry.get(n, "-") for n in names)) for op, entry in served.items()]
    typer.echo(columns(lines))
