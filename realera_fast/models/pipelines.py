"""Pipelines by name: from a folder, the local cache or a single file; offline, without pickles."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from realera_fast.models.components import components_of
from realera_fast.models.places import LoadError, check_model
from realera_fast.models.refusals import why_not_on

DTYPES: Mapping[str, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
"""Dtypes by their short names."""


def find_device(device: str | None) -> torch.device:
    """The device of that name; None is the first GPU, or the CPU.

    Raises:
        LoadError: there is no such device here.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        where = torch.device(device)
    except RuntimeError:
        raise LoadError(f"`device`: no such device: {device!r}") from None
    if where.type == "cuda" and not torch.cuda.is_available():
        raise LoadError(f"`device` {device}: this PyTorch ({torch.__version__}) sees no GPU")
    if where.type == "cuda" and (where.index or 0) >= torch.cuda.device_count():
        last = torch.cuda.device_count() - 1
        raise LoadError(
            f"`device` {device}: there is no such GPU; the last one here is cuda:{last}"
        )
    if reason := why_not_on(where):
        raise LoadError(f"`device` {device}: {reason}")
    return where


def load_pipeline(
    model: str,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | None = None,
    variant: str | None = None,
    base: Path | None = None,
) -> Any:
    """A diffusers pipeline, offline, from safetensors alone.

    Args:
        model: a pipeline folder, the id of a cached one, or a single `.safetensors` checkpoint.
        dtype: of the weights.
        device: "cuda", "cpu" ...; None is the first GPU, or the CPU.
        variant: of the weight files, such as "fp16".
        base: for a single file: a pipeline folder of the same architecture, for the configuration
            and the tokenizers.

    Raises:
        LoadError: with what to do.
    """
    where = find_device(device)
    path = Path(model).expanduser()
    check_model(model, base)
    if base is not None and path.is_file():
        return _from_file(path, base, dtype).to(where)
    pipe = _from_pretrained(model, dtype, variant)
    try:
        components_of(pipe)
    except TypeError as error:
        raise LoadError(
            f"{type(pipe).__name__} has no U-Net or transformer with a text encoder"
        ) from error
    return pipe.to(where)


def _from_pretrained(model: str, dtype: torch.dtype, variant: str | None) -> Any:
    """A pipeline from a folder or the local cache."""
    from diffusers import DiffusionPipeline

    folder = Path(model).expanduser()
    try:
        return DiffusionPipeline.from_pretrained(
            str(folder) if folder.is_dir() else model,
            dtype=dtype,
            variant=variant,
            local_files_only=True,
            # A pickle can run anything on loading; there is no switch to allow it.
            use_safetensors=True,
        )
    except (OSError, ValueError) as error:
        raise LoadError(
            f"cannot load {model}: {' '.join(str(error).split())} (weights must be safetensors; "
            "for files named like model.fp16.safetensors pass `variant` fp16)"
        ) from error


def _from_file(file: Path, base: Path, dtype: torch.dtype) -> Any:
    """A pipeline from a single-file checkpoint, through diffusers' own loader."""
    import diffusers

    name = json.loads((base / "model_index.json").read_bytes())["_class_name"]
    kind: Any = getattr(diffusers, name, None)
    if not hasattr(kind, "from_single_file"):
        raise LoadError(f"`base` {base}: {name} can't be loaded from a single file")
    try:
        return kind.from_single_file(
            str(file), config=str(base), dtype=dtype, local_files_only=True
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise LoadError(f"cannot load {file} as {name}: {reason}") from error
