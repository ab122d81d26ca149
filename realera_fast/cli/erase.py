"""`realera-fast erase`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from realera_fast.cli.inputs import (
    check_concept_tokens,
    check_files,
    check_places,
    concepts_of,
    read_config,
    settings_of,
)
from realera_fast.cli.options import (
    KIND_NAMES,
    Base,
    ConfigFile,
    Debug,
    Device,
    Dtype,
    Force,
    Mining,
    Model,
    NoAlign,
    Out,
    Preset,
    Quiet,
    Target,
    Variant,
    check_placement,
    save_list,
    target_of,
    usage_error,
)
from realera_fast.cli.output import check_output, check_space, output_folder, write_report
from realera_fast.cli.program import app, start_logging
from realera_fast.cli.tables import echo_plan, summary, words_text

if TYPE_CHECKING:
    from realera_fast import EraseConfig, Erasure


@app.command()
def erase(
    model: Model,
    out: Out,
    concept: Annotated[
        list[str] | None,
        typer.Option(
            "--concept",
            "-c",
            metavar="WORDS[=ANCHOR]",
            help="What to erase, and what it becomes; may be given several times.",
            show_default=False,
        ),
    ] = None,
    concepts_file: Annotated[
        Path | None,
        typer.Option(
            "--concepts",
            metavar="FILE",
            help="A list of concepts: .csv, .tsv, .json, .jsonl, .yaml or .txt.",
            show_default=False,
        ),
    ] = None,
    kind: Annotated[
        str,
        typer.Option(
            metavar="KIND",
            help=f"Kind of the concepts ({', '.join(KIND_NAMES)}): "
            "their templates and default anchor.",
        ),
    ] = "object",
    synonym: Annotated[
        list[str] | None,
        typer.Option(
            metavar="WORDS",
            help="Another name of the one concept, erased with it; may be given several times.",
        ),
    ] = None,
    preserve: Annotated[
        list[str] | None,
        typer.Option(
            metavar="WORDS", help="What must keep its meaning; may be given several times."
        ),
    ] = None,
    save: Annotated[
        str,
        typer.Option(
            metavar="LIST",
            help="What to write: pipeline (folder), delta (small file), lora (adapter), kohya "
            "(the same for A1111 and ComfyUI), weights (edited tensors), single-file.",
        ),
    ] = "pipeline,delta",
    spare: Annotated[
        list[str] | None,
        typer.Option(
            metavar="WORD", help="No neighbor, whatever it looks like; may be given several times."
        ),
    ] = None,
    extends: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="DELTA",
            help="A file that 'erase' wrote for MODEL: its concepts go as well, all in one, and "
            "the result takes its place; may be given several times.",
            show_default=False,
        ),
    ] = None,
    target: Target = "weights",
    preset: Preset = None,
    mining: Mining = None,
    no_align: NoAlign = False,
    seed: Annotated[
        int | None, typer.Option(metavar="N", help="Seed of all randomness.", min=0)
    ] = None,
    config: ConfigFile = None,
    dtype: Dtype = "fp32",
    device: Device = None,
    variant: Variant = None,
    base: Base = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Keep checkpoints of the run here; with one in it, go on from there.",
            show_default=False,
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Check everything and say which words would go, and why."),
    ] = False,
    force: Force = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Erase concepts from a model and write the result.

    \b
    Writes into DIR, as --save asks:
      pipeline/            the edited model, for DiffusionPipeline.from_pretrained
      erasure.safetensors  the delta, for 'apply', 'verify' and Erasure.load
      lora/                an adapter, for pipe.load_lora_weights
      kohya.safetensors    the same with the keys of A1111 and ComfyUI
      weights.safetensors  the edited tensors
      model.safetensors    a single-file checkpoint, where MODEL is one
      report.html, report.json

    \b
    Examples:
      realera-fast erase embedded -c cat -o out/no-cat
      realera-fast erase ./sd14 -c "Van Gogh=art" -c "Picasso=art" --kind style \\
          --preserve Monet --save delta,lora --device cuda -o out/no-artists
      realera-fast erase CompVis/stable-diffusion-v1-4 -c cat --synonym kitten \\
          --config settings.json --no-align --seed 7 -o out/no-cat
      realera-fast erase ./xl.safetensors --base ./sdxl --concepts brands.csv \\
          --save delta,single-file --checkpoint out/run -o out/no-brands
      realera-fast erase ./sd14 -c dog -o out/neither \\
          --extends out/no-cat/erasure.safetensors
    """
    edits = target_of(target)
    wanted = save_list(save, edits)
    if "single-file" in wanted and not Path(model).expanduser().is_file():
        raise usage_error("--save", "single-file needs a MODEL that is a single file")
    check_placement(dtype, device)
    concepts, preserved = concepts_of(
        concept or [], concepts_file, kind, synonym or [], preserve or []
    )
    values = read_config(config)
    check_places(model, base, out, force)
    check_files(*(extends or ()))
    before, defaults = _extended(extends or ())
    settings = settings_of(
        values,
        config,
        defaults=defaults,
        mining=mining,
        no_align=no_align,
        seed=seed,
        preset=preset,
        spare=spare or (),
    )
    from realera_fast.cli.loading import load_pipeline
    from realera_fast.dry_run import preview
    from realera_fast.eraser import erase as erase_concepts
    from realera_fast.extending import joined_concepts

    start_logging(quiet)
    asked: dict[str, Any] = dict(
        preserve=preserved,
        config=settings,
        progress=False if quiet else None,
        target=edits,
        extends=before,
    )
    if dry_run:
        check_output(out, force)
        pipe = load_pipeline(model, dtype=dtype, device=device, variant=variant, base=base)
        check_concept_tokens(pipe, concepts, preserved, settings)
        every = joined_concepts(before, concepts)
        echo_plan(pipe, every, preserved, settings, out, wanted, target=edits)
        typer.echo(words_text(preview(pipe, concepts, **asked)))
        return
    with output_folder(out, force) as folder:
        pipe = load_pipeline(model, dtype=dtype, device=device, variant=variant, base=base)
        check_concept_tokens(pipe, concepts, preserved, settings)
        if "pipeline" in wanted:
            check_space(pipe, folder)
        erasure = erase_concepts(
            pipe, concepts, checkpoint_dir=checkpoint, resume=checkpoint is not None, **asked
        )
        _write(erasure, wanted, folder, pipe, model)
        write_report(erasure, folder, model)
        written = sorted(p.name + ("/" if p.is_dir() else "") for p in folder.iterdir())
    typer.echo(summary(erasure))
    typer.echo(f"\nwrote {', '.join(written)} to {out}")


def _extended(files: Sequence[Path]) -> tuple[list[Erasure], EraseConfig | None]:
    """What these files hold, and the settings of the last of them."""
    if not files:
        return [], None
    import realera_fast

    found = [realera_fast.Erasure.load(file) for file in files]
    return found, realera_fast.EraseConfig.from_dict(found[-1].config)


def _write(erasure: Erasure, wanted: Sequence[str], folder: Path, pipe: Any, model: str) -> None:
    """Writes an erasure as ``--save`` asks."""
    from realera_fast.models import component_name, components_of

    edited = components_of(pipe).model
    if "delta" in wanted:
        erasure.save(folder / "erasure.safetensors")
    if "lora" in wanted:
        erasure.save_lora(folder / "lora", edited)
    if "kohya" in wanted:
        erasure.save_lora(folder / "kohya.safetensors", edited, layout="kohya")
    if "weights" in wanted:
        erasure.save_weights(folder / "weights.safetensors", edited)
    if "single-file" in wanted:
        erasure.save_single_file(folder / "model.safetensors", Path(model).expanduser(), edited)
    if "pipeline" in wanted:
        pipe.save_pretrained(folder / "pipeline", safe_serialization=True)
        erasure.annotate(folder / "pipeline" / component_name(pipe))
