"""Pipelines by name: from a folder, the local cache or a single file; offline, without pickles."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from realera_fast.models.components import components_of

DTYPES: Mapping[str, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
"""Dtypes by their short names."""


class LoadError(ValueError):
    """A model can't be loaded. The message says what to do; `device`, `variant` and `base` stand in
    it in backticks, for a command line to name its own options."""


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
    if path.is_file():
        return _from_file(path, base, dtype).to(where)
    if path.is_dir() and not (path / "model_index.json").is_file():
        raise LoadError(f"{model} is not a diffusers pipeline folder: no model_index.json in it")
    if not path.is_dir() and (model.startswith((".", "/", "~")) or model.count("/") != 1):
        raise LoadError(f"{model}: no such folder")
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
    is_folder = folder.is_dir()
    try:
        return DiffusionPipeline.from_pretrained(
            str(folder) if is_folder else model,
            dtype=dtype,
            variant=variant,
            local_files_only=True,
            # A pickle can run anything on loading; there is no switch to allow it.
            use_safetensors=True,
        )
    except (OSError, ValueError) as error:
        if not is_folder and not _is_cached(model):
            raise LoadError(
                f"{model!r} is neither a folder nor in the Hugging Face cache; "
                f"download it first: hf download {model}"
            ) from error
        raise LoadError(
            f"cannot load {model}: {' '.join(str(error).split())} (weights must be safetensors; "
            "for files named like model.fp16.safetensors pass `variant` fp16)"
        ) from error


def _from_file(file: Path, base: Path | None, dtype: torch.dtype) -> Any:
    """A pipeline from a single-file checkpoint, through diffusers' own loader."""
    import diffusers

    if file.suffix != ".safetensors":
        raise LoadError(f"{file}: expected a .safetensors file; a pickle can run anything")
    if base is None or not (base / "model_index.json").is_file():
        raise LoadError(
            f"{file} is a single file; pass `base` with a pipeline folder of the same "
            "architecture, for its configuration and tokenizers"
        )
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


def _is_cached(model: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    with suppress(ValueError):
        return isinstance(try_to_load_from_cache(model, "model_index.json"), str)
    return False
