"""The command line: ``realera-fast erase | apply | verify | info | demo``.

Results go to stdout, progress and messages to stderr. Exit codes: 0 done, 1 failed (one line that
begins with ``error:``; ``--debug`` shows the traceback), 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import importlib.metadata
import io
import json
import logging
import os
import platform
import re
import shutil
import signal
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, NoReturn

import torch
import typer

from realera_fast import __version__, ops
from realera_fast.cli.loading import DTYPES, find_device, load_pipeline
from realera_fast.config import EraseConfig
from realera_fast.eraser import check_tokens
from realera_fast.eraser import erase as erase_concepts
from realera_fast.erasure import Erasure, read_description
from realera_fast.mining import can_be_drawn
from realera_fast.models import (
    component_name,
    components_of,
    family_of,
    projections,
    text_streams,
    why_not_aligned,
)
from realera_fast.runtime import clean_names, folder_atomically, read_json
from realera_fast.text import KINDS, Concept, parse_concept, parse_concepts, read_concepts

PROGRAM = "realera-fast"

SAVED = ("pipeline", "delta", "lora", "kohya", "weights", "single-file")
"""Names of ``--save``."""


class CommandError(Exception):
    """A failure that one line explains."""


app = typer.Typer(
    name=PROGRAM,
    # Plain help: examples keep their lines, and the output is the same in a pipe.
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A diffusers pipeline folder, the id of a cached one, a single .safetensors "
        "checkpoint (with --base), or 'embedded'.",
        show_default=False,
    ),
]
Delta = Annotated[
    Path,
    typer.Argument(
        metavar="DELTA",
        help="A file that 'erase' wrote: erasure.safetensors.",
        show_default=False,
    ),
]
Out = Annotated[
    Path, typer.Option("--out", "-o", metavar="DIR", help="Output folder.", show_default=False)
]
Force = Annotated[
    bool,
    typer.Option("--force", help="Write into a folder that is not empty, replacing what it holds."),
]
Device = Annotated[
    str | None,
    typer.Option(
        metavar="DEVICE", help="cpu, cuda, cuda:1 ... (default: the first GPU, or the CPU)."
    ),
]
Dtype = Annotated[
    str,
    typer.Option(
        metavar="fp32|bf16|fp16",
        help="Dtype in which the model is loaded and saved. On most CPUs the 16-bit ones are slow.",
    ),
]
Variant = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Variant of the weight files, such as fp16."),
]
Base = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="For a MODEL that is one file: a pipeline folder of the same architecture, for the "
        "configuration and the tokenizers, which a single file does not hold.",
        show_default=False,
    ),
]
Mining = Annotated[
    str | None,
    typer.Option(
        metavar="MODE",
        help="How neighbors are mined: vocabulary, gaussian, offset or none.",
    ),
]
NoAlign = Annotated[
    bool, typer.Option("--no-align", help="Closed form alone, without the LoRA stage.")
]
ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="FILE",
        help="JSON with the fields of EraseConfig; the options here override it.",
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of a failure.")]


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """Remove concepts from text-to-image diffusion models.

    \b
    Examples:
      realera-fast demo
      realera-fast erase embedded --concept cat --out out/no-cat
      realera-fast erase ./sd14 --concept "Van Gogh=art" --kind style \\
          --device cuda --dtype fp16 --out out/no-van-gogh
      realera-fast verify ./sd14 out/no-van-gogh/erasure.safetensors \\
          --prompt "a painting by Van Gogh" --untouched "a painting by Monet" \\
          --device cuda --dtype fp16 --out out/check

    Run 'realera-fast COMMAND --help' for the options of a command.
    """
    if version:
        typer.echo(f"{PROGRAM} {__version__}")
        raise typer.Exit()


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
            help=f"Kind of the concepts ({', '.join(KINDS)}): their templates and default anchor.",
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
        bool, typer.Option("--dry-run", help="Check everything and say what would be done.")
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
    """
    wanted = _save_list(save)
    if "single-file" in wanted and not Path(model).expanduser().is_file():
        raise _usage("--save", "single-file needs a MODEL that is a single file")
    concepts, preserved = _concepts(
        concept or [], concepts_file, kind, synonym or [], preserve or []
    )
    settings = _settings(config, mining=mining, no_align=no_align, seed=seed)
    _check_placement(dtype, device)
    _start(quiet)
    if dry_run:
        _check_output(out, force)
        pipe = load_pipeline(model, dtype=DTYPES[dtype], device=device, variant=variant, base=base)
        _check_tokens(pipe, concepts, preserved, settings)
        _echo_plan(pipe, concepts, preserved, settings, out, wanted)
        return
    with _output_folder(out, force) as folder:
        pipe = load_pipeline(model, dtype=DTYPES[dtype], device=device, variant=variant, base=base)
        _check_tokens(pipe, concepts, preserved, settings)
        if "pipeline" in wanted:
            _check_space(pipe, folder)
        edited = components_of(pipe).model
        erasure = erase_concepts(
            pipe,
            concepts,
            preserve=preserved,
            config=settings,
            checkpoint_dir=checkpoint,
            resume=checkpoint is not None,
            progress=False if quiet else None,
        )
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
        _write_report(erasure, folder, model)
        written = sorted(p.name + ("/" if p.is_dir() else "") for p in folder.iterdir())
    typer.echo(_summary(erasure))
    typer.echo(f"\nwrote {', '.join(written)} to {out}")


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
            "left out. The closed form is then what erasing there would give.",
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
    _check_placement(dtype, device)
    erasures = [Erasure.load(delta) for delta in deltas]
    _start(quiet)
    with _output_folder(out, force) as folder:
        pipe = load_pipeline(model, dtype=DTYPES[dtype], device=device, variant=variant, base=base)
        _check_space(pipe, folder)
        edited = components_of(pipe).model
        for erasure in erasures:
            last = erasure.rebase(edited) if rebase else erasure
            last.apply_(edited)
        pipe.save_pretrained(folder, safe_serialization=True)
        last.annotate(folder / component_name(pipe))
    names = ", ".join(repr(c.target) for erasure in erasures for c in erasure.concepts)
    typer.echo(f"wrote a pipeline without {names or 'any change'} to {out}")


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
    from realera_fast import embedded
    from realera_fast.evaluation import ClipJudge, before_after_grid, find_detector, write_html
    from realera_fast.evaluation import numbers as numbers_of
    from realera_fast.evaluation import verify as verify_pictures
    from realera_fast.runtime import write_atomically

    _check_placement(dtype, device)
    numbers = _seeds(seeds)
    erasure = Erasure.load(delta)
    try:
        detectors = {name: find_detector(name) for name in detector or ()}
    except ValueError as error:
        raise _usage("--detector", str(error)) from error
    _start(quiet)
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
    with _output_folder(out, force) as folder:
        pipe = load_pipeline(model, dtype=DTYPES[dtype], device=device, variant=variant, base=base)
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
        title = f"Before and after: {_names(erasure)}"
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
        write_atomically(folder / "report.json", _json(outcome).encode())
    for warning in found.warnings:
        typer.echo(f"warning: {warning}", err=True)
    lines = [("change of pixels", "of text", "group", "prompt")]
    lines += [
        (
            f"{100 * row.change:.1f} %",
            f"{100 * (row.text_change or 0):.1f} %",
            row.group,
            row.prompt,
        )
        for row in found.rows
    ]
    typer.echo(_columns(lines, right=(0, 1)))
    typer.echo(f"\nwrote before_after.png, report.html, report.json to {out}")


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
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
    debug: Debug = False,
) -> None:
    """Print what was erased in a FILE, how, and on top of what; without one, versions, devices,
    and which implementation serves each operation.

    \b
    Examples:
      realera-fast info
      realera-fast info out/no-cat/erasure.safetensors
      realera-fast info out/no-cat/lora/pytorch_lora_weights.safetensors --json
    """
    if file is not None:
        described = read_description(file)
        typer.echo(_json(described) if as_json else _told(described), nl=not as_json)
        return
    found = _info()
    if as_json:
        typer.echo(_json(found), nl=False)
        return
    typer.echo("versions")
    typer.echo(_columns([("", name, text or "-") for name, text in found["versions"].items()]))
    typer.echo("\ndevices")
    typer.echo(_columns([("", d["name"], d["description"]) for d in found["devices"]]))
    typer.echo("\noperations")
    served = found["operations"]
    names = list(dict.fromkeys(device for entry in served.values() for device in entry))
    lines = [("", "", *names)]
    lines += [("", op, *(entry.get(n, "-") for n in names)) for op, entry in served.items()]
    typer.echo(_columns(lines))


@app.command(short_help="Erase an object and a style from the model that ships here.")
def demo(
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Output folder.")] = Path(
        "out/demo"
    ),
    thing: Annotated[str, typer.Option(metavar="WORD", help="The object to erase.")] = "cat",
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
    if not quiet:
        # Said before the imports below, which take seconds.
        typer.echo(
            f"demo: erasing {thing!r} and the style {style!r} from the embedded model; "
            "a minute or a few on a CPU",
            err=True,
        )
    from realera_fast.cli.demo_job import FILES, run_demo
    from realera_fast.cli.demo_plan import ERASE_CONFIG, DemoConfig

    settings = _settings(config, mining=mining, no_align=no_align, seed=seed, defaults=ERASE_CONFIG)
    _start(quiet)
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


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Runs the command line and exits with its code."""
    # Being stopped by a scheduler must not leave half-written folders either.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    # A word that the terminal can't show is no failure.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    sys.exit(run(sys.argv[1:] if arguments is None else arguments))


def run(arguments: Sequence[str]) -> int:
    """Runs the command line; returns the exit code and leaves this process as it was."""
    with _settings_kept():
        return _run(arguments)


def _run(arguments: Sequence[str]) -> int:
    try:
        _check_text(arguments)
        code = app(args=list(arguments), prog_name=PROGRAM, standalone_mode=False)
        sys.stdout.flush()
        if code == 130:  # typer's word for KeyboardInterrupt
            typer.echo("interrupted", err=True)
        return code if isinstance(code, int) else 0
    except BrokenPipeError:
        # The reader went away ("info | head"): nothing is left to say, and nobody to say it to.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except typer.Abort:
        typer.echo("aborted", err=True)
        return 1
    except _CLICK_ERROR as error:  # wrong usage: prints the command's usage line and the reason
        error.show()
        return int(error.exit_code)
    except Exception as error:
        if "--debug" in arguments:
            traceback.print_exc()
        typer.echo(f"error: {_reason(error)}", err=True)
        return 1


# The base of all usage errors. Newer typers carry their own copy of click, older ones use click:
# the class has no public name that fits both.
_CLICK_ERROR: Any = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")


def _reason(error: Exception) -> str:
    """One line that says what went wrong."""
    if isinstance(error, OSError) and error.strerror:
        reason = f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    else:
        reason = " ".join(str(error).split())
    if isinstance(error, CommandError | ValueError | TypeError | OSError | RuntimeError):
        return reason or type(error).__name__
    return f"{type(error).__name__}: {reason} (--debug shows where)"


def _start(quiet: bool) -> None:
    """Sets up messages on stderr; `_settings_kept` undoes it."""
    logging.basicConfig(level=logging.WARNING, format="warning: %(message)s", stream=sys.stderr)
    from transformers.utils import logging as transformers_logging

    # Importing its models logs what optional packages it would like; users did not ask.
    transformers_logging.set_verbosity_error()
    if quiet:
        from diffusers.utils import logging as diffusers_logging

        transformers_logging.disable_progress_bar()
        diffusers_logging.disable_progress_bar()


@contextmanager
def _settings_kept() -> Iterator[None]:
    """Puts the root logger and the other libraries' messages back as they were."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    modules: list[Any] = [
        sys.modules.get(f"{name}.utils.logging") for name in ("diffusers", "transformers")
    ]
    kept = [(m, m.get_verbosity(), m.is_progress_bar_enabled()) for m in modules if m]
    try:
        yield
    finally:
        root.handlers[:], root.level = handlers, level
        for module, verbosity, bars in kept:
            module.set_verbosity(verbosity)
            (module.enable_progress_bar if bars else module.disable_progress_bar)()


def _check_text(arguments: Sequence[str]) -> None:
    """Refuses arguments that this system could not read as text."""
    for place, argument in enumerate(arguments):
        try:
            argument.encode()
        except UnicodeEncodeError:
            before = arguments[place - 1] if place else ""
            named = argument.split("=")[0] if argument.startswith("--") else before
            told = argument.encode("utf-8", "backslashreplace").decode()
            # Bytes that are not valid stand for themselves in the upper half of the surrogates.
            told = re.sub(r"\\udc([89a-f][0-9a-f])", r"\\x\1", told)
            raise _usage(
                named if named.startswith("-") else f"argument {place + 1}",
                f"'{told}' is not valid text; pass it in this terminal's encoding "
                f"({sys.getfilesystemencoding()})",
            ) from None


def _usage(option: str, message: str) -> typer.BadParameter:
    return typer.BadParameter(message, param_hint=f"'{option}'")


def _option_of(error: ValueError) -> str:
    """The option that an error about names is about: its message begins with the argument."""
    options = {
        "preserve": "--preserve",
        "Concept.synonyms": "--synonym",
        "templates": "--config",
        "tokenizer": "MODEL",
    }
    return options.get(re.split("[: ]", str(error))[0], "--concept")


def _save_list(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    unknown = [name for name in names if name not in SAVED]
    if unknown or not names:
        raise _usage("--save", f"expected a list of {', '.join(SAVED)}, got {text!r}")
    return names


def _seeds(text: str) -> list[int]:
    try:
        seeds = [int(part) for part in text.split(",")]
    except ValueError:
        raise _usage("--seeds", f"expected numbers such as 0,1,2, got {text!r}") from None
    if min(seeds) < 0 or max(seeds) >= 2**63:
        raise _usage("--seeds", f"seeds are from 0 to 2^63 - 1, got {text!r}")
    return seeds


def _check_placement(dtype: str, device: str | None) -> None:
    if dtype not in DTYPES:
        raise _usage("--dtype", f"expected one of {', '.join(DTYPES)}, got {dtype!r}")
    try:
        torch.device(device or "cpu")
    except RuntimeError:
        raise _usage("--device", f"no such device: {device!r}") from None


def _concepts(
    words: Sequence[str],
    file: Path | None,
    kind: str,
    synonyms: Sequence[str],
    preserve: Sequence[str],
) -> tuple[tuple[Concept, ...], list[str]]:
    if kind not in KINDS:
        raise _usage("--kind", f"expected one of {', '.join(KINDS)}, got {kind!r}")
    if bool(words) == (file is not None):
        raise _usage("--concept", "expected --concept, or --concepts with a file")
    if synonyms and len(words) != 1:
        raise _usage("--synonym", f"needs exactly one --concept, got {len(words)}")
    try:
        preserve = clean_names(preserve, "preserve")
    except ValueError as error:
        raise _usage("--preserve", str(error)) from error
    if file is not None:
        return parse_concepts(read_concepts(file, kind=kind), preserve=preserve), list(preserve)
    try:
        concepts = [parse_concept(word, kind=kind) for word in words]
        if synonyms:
            concepts = [replace(concepts[0], synonyms=tuple(synonyms))]
        return parse_concepts(concepts, preserve=preserve), list(preserve)
    except ValueError as error:
        raise _usage(_option_of(error), str(error)) from error


def _check_tokens(
    pipe: Any, concepts: Sequence[Concept], preserve: Sequence[str], config: EraseConfig
) -> None:
    """What only the model's tokenizers can tell of the names is wrong usage like all else."""
    parts = components_of(pipe)
    texts = text_streams(parts.model, parts.text_encoders, parts.tokenizers)
    try:
        check_tokens(texts, concepts, preserve, config)
    except ValueError as error:
        raise _usage(_option_of(error), str(error)) from error


def _settings(
    file: Path | None,
    *,
    mining: str | None,
    no_align: bool,
    seed: int | None,
    defaults: EraseConfig | None = None,
) -> EraseConfig:
    """`EraseConfig` from a file, or `defaults` without one, and the options that override it."""
    config = defaults or EraseConfig()
    if file is not None:
        try:
            config = EraseConfig.from_dict(read_json(file.read_bytes()))
        except OSError as error:
            raise _usage("--config", f"{file}: {error.strerror}") from error
        except ValueError as error:
            raise _usage("--config", f"{file}: {error}") from error
    try:
        if mining is not None:
            config = replace(config, mining=replace(config.mining, mode=mining))
    except ValueError as error:
        raise _usage("--mining", str(error)) from error
    if no_align:
        config = replace(config, alignment=replace(config.alignment, enabled=False))
    return config if seed is None else replace(config, seed=seed)


def _check_output(out: Path, force: bool) -> Path:
    """The folder to write, resolved, after making sure that it may be written."""
    out = out.expanduser().resolve()
    if out.exists() and not out.is_dir():
        raise CommandError(f"--out {out} is a file")
    if out.is_dir() and any(out.iterdir()) and not force:
        raise CommandError(f"--out {out} is not empty; choose another folder or pass --force")
    return out


@contextmanager
def _output_folder(out: Path, force: bool) -> Iterator[Path]:
    """A folder that becomes `out` at the end, or never."""
    out = _check_output(out, force)
    stack = ExitStack()
    try:
        staged = stack.enter_context(folder_atomically(out, replace=force))
    except OSError as error:
        raise CommandError(f"cannot write --out {out}: {error.strerror}") from error
    with stack:
        yield staged


def _check_space(pipe: Any, folder: Path) -> None:
    modules = (m for m in pipe.components.values() if isinstance(m, torch.nn.Module))
    needed = sum(t.numel() * t.element_size() for m in modules for t in m.state_dict().values())
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise CommandError(
            f"the edited pipeline needs {needed / 1e9:.2f} GB and --out has {free / 1e9:.2f} GB "
            "free; --save delta needs far less"
        )


def _names(erasure: Erasure) -> str:
    return ", ".join(concept.target for concept in erasure.concepts) or "nothing"


def _json(values: Mapping[str, Any]) -> str:
    return json.dumps(values, indent=1, default=str) + "\n"


def _write_report(erasure: Erasure, folder: Path, model: str) -> None:
    from realera_fast.evaluation import write_html
    from realera_fast.runtime import write_atomically

    write_html(
        folder / "report.html",
        title=f"Erased: {_names(erasure)}",
        summary=f"From {model}. For pictures before and after, run: {PROGRAM} verify",
        warnings=erasure.report.get("warnings", ()),
        tables=[],
        report=erasure.report,
        provenance={**erasure.provenance, "erase_config": erasure.config},
    )
    report = {
        "model": model,
        "concepts": [concept.to_dict() for concept in erasure.concepts],
        "report": dict(erasure.report),
        "provenance": dict(erasure.provenance),
        "erase_config": dict(erasure.config),
    }
    write_atomically(folder / "report.json", _json(report).encode())


def _summary(erasure: Erasure) -> str:
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
    text = [_columns(lines, right=(3, 4))]
    for target, words in report.get("neighbors", {}).items():
        if words:
            more = f" and {len(words) - 8} more" if len(words) > 8 else ""
            text.append(f"neighbors of {target}: {', '.join(words[:8])}{more}")
    solve = report.get("solve", {})
    if solve:
        text.append(
            f"solve: {solve['method']}, rank {solve['rank']}, condition {solve['condition']:.1e}, "
            f"residual ratio {solve['residual_ratio']:.2g}"
        )
    seconds = report.get("seconds", {})
    if seconds:
        parts = ", ".join(f"{name} {value:.1f}" for name, value in seconds.items())
        text.append(f"{sum(seconds.values()):.1f} seconds: {parts}")
    return "\n".join(text)


def _told(described: Mapping[str, Any]) -> str:
    """What `info FILE` prints."""
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
                concept.anchor_name,
                concept.kind,
            )
        )
    text = [f"{described['file']}: {described['holds']}", _columns(lines)]
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
    text.append(_columns(rows))
    history = provenance.get("history", [])
    if history:
        text.append("\nhistory, oldest first")
        text.append(
            _columns(
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


def _echo_plan(
    pipe: Any,
    concepts: Sequence[Concept],
    preserve: Sequence[str],
    config: EraseConfig,
    out: Path,
    wanted: Sequence[str],
) -> None:
    parts = components_of(pipe)
    layers = projections(parts.model)
    text = text_streams(parts.model, parts.text_encoders, parts.tokenizers)["sequence"][0]
    weight = next(iter(layers.values())).weight
    dtype = str(weight.dtype).removeprefix("torch.")
    typer.echo(f"would edit {len(layers)} projections of {type(parts.model).__name__} ({dtype})")
    lines = [("", "word", "kind", "becomes", "tokens")]
    for concept in concepts:
        for word in concept.words:
            tokens = str(len(text.token_ids(word)))
            lines.append(("", word, concept.kind, concept.anchor_name, tokens))
    typer.echo(_columns(lines, right=(4,)))
    if preserve:
        typer.echo(f"would preserve {', '.join(preserve)}")
    encoders = parts.text_encoders
    count = len(encoders) if isinstance(encoders, tuple | list) else 1
    family = family_of(parts.model, count)
    for sentence in family.explained():
        typer.echo(f"would read {sentence}")
    not_aligned = why_not_aligned(parts.model, family, config.alignment.latent_size)
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


def _info() -> dict[str, Any]:
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


def _columns(lines: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
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
