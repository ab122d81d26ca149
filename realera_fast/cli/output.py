"""Folders that commands write into: checked first, written whole."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from realera_fast.cli.options import PROGRAM, CommandError
from realera_fast.cli.tables import joined_names, json_text

if TYPE_CHECKING:
    from realera_fast.erasure import Erasure


def check_output(out: Path, force: bool) -> Path:
    """The folder to write, resolved, after making sure that it may be written."""
    out = out.expanduser().resolve()
    if out.exists() and not out.is_dir():
        raise CommandError(f"--out {out} is a file")
    if out.is_dir() and any(out.iterdir()) and not force:
        raise CommandError(f"--out {out} is not empty; choose another folder or pass --force")
    return out


@contextmanager
def output_folder(out: Path, force: bool) -> Iterator[Path]:
    """A folder that becomes `out` at the end, or never."""
    from realera_fast.runtime import folder_atomically

    out = check_output(out, force)
    stack = ExitStack()
    try:
        staged = stack.enter_context(folder_atomically(out, replace=force))
    except OSError as error:
        raise CommandError(f"cannot write --out {out}: {error.strerror}") from error
    with stack:
        yield staged


def check_space(pipe: Any, folder: Path) -> None:
    import torch

    modules = (m for m in pipe.components.values() if isinstance(m, torch.nn.Module))
    needed = sum(t.numel() * t.element_size() for m in modules for t in m.state_dict().values())
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise CommandError(
            f"the edited pipeline needs {needed / 1e9:.2f} GB and --out has {free / 1e9:.2f} GB "
            "free; --save delta needs far less"
        )


def write_report(erasure: Erasure, folder: Path, model: str) -> None:
    from realera_fast.evaluation import write_html
    from realera_fast.runtime import write_atomically

    write_html(
        folder / "report.html",
        title=f"Erased: {joined_names(erasure)}",
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
    write_atomically(folder / "report.json", json_text(report).encode())
