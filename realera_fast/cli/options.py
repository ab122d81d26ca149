"""Options that several commands take."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer

PROGRAM = "realera-fast"

SAVED = ("pipeline", "delta", "lora", "kohya", "weights", "single-file")
"""Names of ``--save``."""
_OF_WEIGHTS = ("pipeline", "weights", "single-file")
"""Those that hold edited weights."""


# What the library knows as well; said here, a mistake costs no import of torch.
KIND_NAMES = ("object", "style", "person", "explicit")
PRESETS = ("adversarial", "fast", "paper", "strict")
MINING_MODES = ("vocabulary", "gaussian", "offset", "none")
DTYPE_NAMES = ("fp32", "bf16", "fp16")
DEVICE_TYPES = (
    *("cpu", "cuda", "hpu", "ipu", "maia", "meta", "mps", "mtia", "npu", "privateuseone"),
    *("vulkan", "xla", "xpu"),
)


class CommandError(Exception):
    """A failure that one line explains."""


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
Preset = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="fast: the closed form alone; strict: the same where value projections speak, "
        "harder to attack; adversarial: trained against attacks; paper: RealEra as published "
        "(default: both stages, with scales that the model chooses).",
    ),
]
Target = Annotated[
    str,
    typer.Option(
        metavar="weights|adapter",
        help="What is edited: the weights, or an adapter beside them, for a MODEL that is "
        "quantized (with --save delta,lora).",
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


def check_text(arguments: Sequence[str]) -> None:
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
            raise usage_error(
                named if named.startswith("-") else f"argument {place + 1}",
                f"'{told}' is not valid text; pass it in this terminal's encoding "
                f"({sys.getfilesystemencoding()})",
            ) from None


def usage_error(option: str, message: str) -> typer.BadParameter:
    return typer.BadParameter(message, param_hint=f"'{option}'")


def option_of(error: ValueError) -> str:
    """The option that an error about names is about: its message begins with the argument."""
    options = {
        "preserve": "--preserve",
        "Concept.synonyms": "--synonym",
        "templates": "--config",
        "tokenizer": "MODEL",
    }
    return options.get(re.split("[: ]", str(error))[0], "--concept")


def target_of(text: str) -> Literal["weights", "adapter"]:
    if text == "adapter":
        return "adapter"
    if text != "weights":
        raise usage_error("--target", f"expected weights or adapter, got {text!r}")
    return "weights"


def save_list(text: str, target: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    unknown = [name for name in names if name not in SAVED]
    if unknown or not names:
        raise usage_error("--save", f"expected a list of {', '.join(SAVED)}, got {text!r}")
    edited = [name for name in names if name in _OF_WEIGHTS]
    if target == "adapter" and edited:
        raise usage_error(
            "--save",
            f"--target adapter edits no weights, so there is no {edited[0]} to write; pass --save "
            "delta,lora (or kohya)",
        )
    return names


def seeds_of(text: str) -> list[int]:
    try:
        seeds = [int(part) for part in text.split(",")]
    except ValueError:
        raise usage_error("--seeds", f"expected numbers such as 0,1,2, got {text!r}") from None
    if min(seeds) < 0 or max(seeds) >= 2**63:
        raise usage_error("--seeds", f"seeds are from 0 to 2^63 - 1, got {text!r}")
    return seeds


def check_placement(dtype: str, device: str | None) -> None:
    if dtype not in DTYPE_NAMES:
        raise usage_error("--dtype", f"expected one of {', '.join(DTYPE_NAMES)}, got {dtype!r}")
    if device is not None and not re.fullmatch(rf"({'|'.join(DEVICE_TYPES)})(:\d{{1,3}})?", device):
        raise usage_error("--device", f"no such device: {device!r}")
