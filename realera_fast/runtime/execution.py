"""How a stage runs, whatever it computes: with whom, kept where, shown how."""

from __future__ import annotations

from dataclasses import dataclass, field

from realera_fast.runtime.checkpoint import Checkpoint
from realera_fast.runtime.processes import Processes


@dataclass(frozen=True)
class Execution:
    """Processes that share a stage, the checkpoint that it is resumed from, and its bars."""

    processes: Processes = field(default_factory=Processes)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    progress: bool | None = None
    """Whether bars are drawn; None follows diffusers' switch."""

    @property
    def main_progress(self) -> bool | None:
        """`progress` of the main process: bars of the others would draw over its own."""
        return self.progress if self.processes.is_main else False
