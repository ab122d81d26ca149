"""A run that was cut off goes on: one file a stage, complete or absent.

It holds everything that the next step depends on, so that a resumed run takes the very steps of one
that was never stopped.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from realera_fast.runtime.files import write_atomically
from realera_fast.runtime.processes import Processes

ALIGNMENT, ATTACK, MEMBERS = "alignment", "attack", "members"
"""Names of the checkpoints of training, of attacks and of the search for members."""

SECONDS = 30.0
"""Least time between two files of a stage that grows: a kill loses no more than that and a step."""


class CheckpointError(ValueError):
    """The checkpoint is unreadable or of another run. The message says what to do."""


@dataclass(frozen=True)
class State:
    """What a stage needs to go on."""

    tensors: dict[str, Tensor]
    values: dict[str, Any]
    """Plain JSON values."""


class Checkpoint:
    """Files of one run in a folder, one a stage; without a folder it does nothing."""

    def __init__(self, folder: Path | None = None, run: str = "", resume: bool = False) -> None:
        """
        Args:
            folder: where the files are; it is made when the first one is written.
            run: identifies model, concepts and settings, so that no other run is continued.
            resume: whether `load` and `load_together` read what is there.
        """
        self.folder, self.run, self.resume = folder, run, resume
        self._last: dict[str, float] = {}
        """When a stage began or was last saved, by name."""

    def file(self, name: str) -> Path | None:
        """Where the state of the stage of that name is."""
        return None if self.folder is None else self.folder / f"{name}.safetensors"

    def load(self, name: str) -> State | None:
        """The state of a stage that begins; None where there is none, or none is asked for.

        Raises:
            CheckpointError: it can't be read, or was written by another run.
        """
        self._last[name] = time.monotonic()
        path = self.file(name)
        if path is None or not self.resume or not path.exists():
            return None
        return _read(path, self.run)

    def load_together(self, name: str, processes: Processes, device: torch.device) -> State | None:
        """`load`, the same for every process: where one fails, all do, so that none waits for it.

        Args:
            device: where the processes exchange what they found.

        Raises:
            CheckpointError: it can't be read, was written by another run, or is not there for every
                process.
        """
        state, broken = None, None
        try:
            state = self.load(name)
        except CheckpointError as error:
            broken = error
        if self.folder is None or not self.resume:
            return None
        counts = torch.tensor(
            [float(broken is not None), float(state is not None)],
            dtype=torch.float32,
            device=device,
        )
        processes.sum_([counts])
        if broken is not None:
            raise broken
        if bool(counts[0]):
            raise CheckpointError(
                f"checkpoint_dir: another process can't read {self.file(name)} and says why; "
                "delete it, or start with resume=False"
            )
        if int(counts[1]) not in (0, processes.count):
            raise CheckpointError(
                f"checkpoint_dir: {self.folder} is not the same folder for all processes; name one "
                "that they share"
            )
        return state

    def is_due(self, name: str, *, always: bool = False) -> bool:
        """Whether there is a folder and the stage has not been saved for `SECONDS`.

        Args:
            always: whether a folder is enough.
        """
        if self.folder is None:
            return False
        return always or time.monotonic() - self._last.get(name, -math.inf) >= SECONDS

    def save(self, name: str, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Replaces the state of a stage.

        Args:
            tensors: by name, on any device.
            values: plain JSON values.
        """
        from safetensors.torch import save as serialized

        path = self.file(name)
        if path is None:
            return
        rested = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        data = serialized(rested, {"run": self.run, "state": json.dumps(dict(values))})
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, data)
        self._last[name] = time.monotonic()

    def remove(self, name: str) -> None:
        """Deletes the state of a stage, if there is one."""
        path = self.file(name)
        if path is not None:
            path.unlink(missing_ok=True)


def _read(path: Path, run: str) -> State:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as opened:
            metadata = opened.metadata() or {}
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
        values = json.loads(metadata["state"])
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
    return State(tensors, values)
