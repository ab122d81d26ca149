"""A run that was cut off goes on: one file a stage, complete or absent.

It holds everything that the next step depends on, so that a resumed run takes the very steps of one
that was never stopped.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from realera_fast.runtime.files import write_atomically
from realera_fast.runtime.processes import Processes

ALIGNMENT, MEMBERS = "alignment", "members"
"""Names of the checkpoints of training and of the search for members."""


class CheckpointError(ValueError):
    """The checkpoint is unreadable or of another run. The message says what to do."""


def file(folder: Path, name: str) -> Path:
    """Where the checkpoint of that name is."""
    return folder / f"{name}.safetensors"


def save(
    folder: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any], run: str, name: str
) -> None:
    """Replaces a checkpoint.

    Args:
        tensors: by name, on any device.
        state: plain JSON values.
        run: identifies the run: model, concepts, settings.
        name: of the checkpoint; a stage has one.
    """
    from safetensors.torch import save as serialized

    values = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    data = serialized(values, {"run": run, "state": json.dumps(dict(state))})
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(file(folder, name), data)


def remove(folder: Path, name: str) -> None:
    """Deletes a checkpoint, if there is one."""
    file(folder, name).unlink(missing_ok=True)


def load(folder: Path, run: str, name: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Tensors and state of the checkpoint, or None where there is none yet.

    Raises:
        CheckpointError: it can't be read, or was written by another run.
    """
    from safetensors import SafetensorError, safe_open

    path = file(folder, name)
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt", device="cpu") as opened:
            metadata = opened.metadata() or {}
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
        state = json.loads(metadata["state"])
    except (SafetensorError, KeyError, ValueError) as error:
        raise CheckpointError(
            f"checkpoint_dir: {path} is not a checkpoint of this library ({error}); delete it, or "
            "start with resume=False"
        ) from error
    if metadata.get("run") != run:
        raise CheckpointError(
            f"checkpoint_dir: {path} is of another run (other model, concepts, settings or seed); "
            "name another folder, or start with resume=False, which replaces it"
        )
    return tensors, state


def load_together(
    folder: Path, run: str, name: str, processes: Processes, device: torch.device
) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """`load`, the same for every process: where one fails, all do, so that none waits for it.

    Args:
        device: where the processes exchange what they found.

    Raises:
        CheckpointError: it can't be read, was written by another run, or is not there for every
            process.
    """
    found, broken = None, None
    try:
        found = load(folder, run, name)
    except CheckpointError as error:
        broken = error
    counts = torch.tensor(
        [float(broken is not None), float(found is not None)], dtype=torch.float32, device=device
    )
    processes.sum_([counts])
    if broken is not None:
        raise broken
    if bool(counts[0]):
        raise CheckpointError(
            f"checkpoint_dir: another process can't read {file(folder, name)} and says why; delete "
            "it, or start with resume=False"
        )
    if int(counts[1]) not in (0, processes.count):
        raise CheckpointError(
            f"checkpoint_dir: {folder} is not the same folder for all processes; name one that "
            "they share"
        )
    return found
