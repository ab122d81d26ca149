"""Models that commands name. Refusals speak of options where the library speaks of arguments."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from realera_fast import embedded, models
from realera_fast.cli.options import CommandError

if TYPE_CHECKING:
    import torch

_ARGUMENTS = re.compile("`(device|variant|base)`")
"""Arguments that are options by the same name, as `models.LoadError` writes them."""


def find_device(name: str | None) -> torch.device:
    """The device of that name; None is the first GPU, or the CPU."""
    with _told_in_options():
        return models.find_device(name)


def check_model(model: str, base: Path | None) -> None:
    """Refuses what names no model, before anything that takes seconds.

    Raises:
        CommandError: with what to do.
    """
    if model != "embedded":
        with _told_in_options():
            models.check_model(model, base)


def load_pipeline(
    model: str, *, dtype: str, device: str | None, variant: str | None, base: Path | None
) -> Any:
    """A pipeline by a name that `models.load_pipeline` knows, or "embedded".

    Args:
        dtype: a short name, such as "fp16".

    Raises:
        CommandError: with what to do.
    """
    with _told_in_options():
        if model != "embedded":
            return models.load_pipeline(
                model, dtype=models.DTYPES[dtype], device=device, variant=variant, base=base
            )
        where = models.find_device(device)
    if not (embedded.FOLDER / "pipeline" / "model_index.json").is_file():
        raise CommandError("this installation does not hold the embedded model")
    pipe: Any = embedded.load_pipeline(models.DTYPES[dtype])
    return pipe.to(where)


@contextmanager
def _told_in_options() -> Iterator[None]:
    """Turns the library's refusals inside into the command's."""
    try:
        yield
    except models.LoadError as error:
        raise CommandError(_ARGUMENTS.sub(r"--\1", str(error))) from error
