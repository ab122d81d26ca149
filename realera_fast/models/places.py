"""Where pipelines are: in a folder, the local cache or a single file. Told without torch."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path


class LoadError(ValueError):
    """A model can't be loaded. The message says what to do; `device`, `variant` and `base` stand in
    it in backticks, for a command line to name its own options."""


def check_model(model: str, base: Path | None) -> None:
    """Refuses what names no model, by what is there: nothing of it is read.

    Args:
        model, base: as in `load_pipeline`.

    Raises:
        LoadError: with what to do.
    """
    path = Path(model).expanduser()
    if path.is_file():
        if path.suffix != ".safetensors":
            raise LoadError(f"{path}: expected a .safetensors file; a pickle can run anything")
        if base is None or not (base / "model_index.json").is_file():
            raise LoadError(
                f"{path} is a single file; pass `base` with a pipeline folder of the same "
                "architecture, for its configuration and tokenizers"
            )
    elif path.is_dir():
        if not (path / "model_index.json").is_file():
            raise LoadError(
                f"{model} is not a diffusers pipeline folder: no model_index.json in it"
            )
    elif model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise LoadError(f"{model}: no such folder")
    elif not _is_cached(model):
        raise LoadError(
            f"{model!r} is neither a folder nor in the Hugging Face cache; "
            f"download it first: hf download {model}"
        )


def _is_cached(model: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    with suppress(ValueError):
        return isinstance(try_to_load_from_cache(model, "model_index.json"), str)
    return False
