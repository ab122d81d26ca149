"""Training that was cut off goes on: one file, complete or absent.

It holds everything that the next step depends on, the window of trajectories too, so that a resumed
run takes the very steps of one that was never stopped.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from realera_fast.files import write_atomically

FILE = "alignment.safetensors"
"""Name of the checkpoint in its folder."""


class CheckpointError(ValueError):
    """The checkpoint is unreadable or of another run. The message says what to do."""


def save(folder: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any], run: str) -> None:
    """Replaces the checkpoint of a folder.

    Args:
        tensors: by name, on any device.
        state: plain JSON values.
        run: identifies the run: model, concepts, settings.
    """
    from safetensors.torch import save as serialized

    values = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    data = serialized(values, {"run": run, "state": json.dumps(dict(state))})
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / FILE, data)


def load(folder: Path, run: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Tensors and state of the checkpoint, or None where there is none yet.

    Raises:
        CheckpointError: it can't be read, or was written by another run.
    """
    from safetensors import SafetensorError, safe_open

    path = folder / FILE
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
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
