"""`realera-fast push`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from realera_fast.cli.inputs import check_files
from realera_fast.cli.options import Debug
from realera_fast.cli.program import app


@app.command(short_help="Upload an erasure to the Hugging Face Hub.")
def push(
    delta: Annotated[
        Path,
        typer.Argument(
            metavar="DELTA",
            help="A file that 'erase' wrote, erasure.safetensors, or its folder: an adapter in "
            "lora/ goes with it.",
            show_default=False,
        ),
    ],
    repo: Annotated[
        str,
        typer.Argument(
            metavar="REPO",
            help="Name of the repository, NAME/MODEL; it is made where it is not there.",
            show_default=False,
        ),
    ],
    private: Annotated[
        bool, typer.Option("--private", help="A new repository is seen by its owner alone.")
    ] = False,
    revision: Annotated[
        str | None,
        typer.Option(metavar="BRANCH", help="Branch, which must be there (default: main)."),
    ] = None,
    message: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="Message of the commit (default: the concepts)."),
    ] = None,
    endpoint: Annotated[
        str | None, typer.Option(metavar="URL", help="Another Hub than huggingface.co.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Upload an erasure with its model card, for Erasure.from_pretrained(REPO), and its adapter,
    for pipe.load_lora_weights(REPO). Log in first: hf auth login.

    \b
    Examples:
      realera-fast push out/no-dog/erasure.safetensors me/sd14-no-dog
      realera-fast push out/no-dog me/sd14-no-dog --private
    """
    file = delta / "erasure.safetensors" if delta.is_dir() else delta
    check_files(file)
    from realera_fast.erasure import Erasure

    erasure = Erasure.load(file)
    lora = delta / "lora" / "pytorch_lora_weights.safetensors"
    commit = erasure.push_to_hub(
        repo,
        adapter=lora if lora.is_file() else False,
        private=private or None,
        revision=revision,
        commit_message=message,
        endpoint=endpoint,
    )
    typer.echo(f"pushed to {commit}")
