"""The embedded model in front of a judge: draws, names, and is put back."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from quality.editing import Editable
from quality.methods import Method
from quality.tasks import Task
from realera_fast import embedded
from realera_fast.embedded.flow import FLOW, flow_words, load_flow
from realera_fast.evaluation import Sampling, Shot, generate, judged

STEPS = 6
"""Denoising steps of an image: few, and the judge still names the un-erased model's."""


class Studio:
    """The embedded pipeline and its judge: draws, names, and puts the model back."""

    def __init__(
        self, dtype: torch.dtype, world: Path | None = None, denoiser: str = "unet"
    ) -> None:
        """
        Args:
            world: Folder of another model, as `run.py embedded --out` exports it.
            denoiser: "unet", or "transformer": the flow-matching sibling.
        """
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        flow = denoiser == "transformer"
        load, words = (load_flow, flow_words) if flow else (embedded.load_pipeline, embedded.words)
        self.pipe: Any = load(dtype, world).to(self.device)
        self.denoiser: Any = getattr(self.pipe, denoiser)
        self.judge, self.table = embedded.load_judge(world), words(world)
        call = self.table.sampling
        self.sampling = Sampling(
            steps=STEPS,
            guidance=call["guidance_scale"],
            height=call["height"],
            width=call["width"],
            batch_size=64,
            max_sequence_length=call.get("max_sequence_length"),
        )
        folder = (world or embedded.FOLDER) / (FLOW if flow else "pipeline") / denoiser
        weights = folder / "diffusion_pytorch_model.safetensors"
        self.fingerprint = hashlib.sha256(weights.read_bytes()).hexdigest()[:12]
        """Of the denoiser's file: rows of two models do not mix."""
        self._editable = Editable(self.pipe, (self.denoiser, self.pipe.text_encoder))

    def draw(self, shots: Sequence[Shot]) -> list[Image.Image]:
        """Image i of shot i."""
        prompts, seeds = [shot.prompt for shot in shots], [shot.seed for shot in shots]
        return generate(self.pipe, prompts, seeds, self.sampling, progress=False)

    def seen(self, task: Task, shots: Sequence[Shot]) -> list[str]:
        """What the judge sees in the images of these shots."""
        names = judged(self.judge, shots, self.draw(shots))
        # Only where the category is asked for: relatives are judged by their own names.
        return [
            task.name if shot.expected == task.name and name in task.category else name
            for shot, name in zip(shots, names, strict=True)
        ]

    def erased(
        self, method: Method | None, task: Task, seed: int, work: Callable[[], Any]
    ) -> tuple[Any, float, dict[str, Any]]:
        """What `work` makes of the edited model, seconds of the edit, and what that says of
        itself."""
        if method is None:
            return work(), 0.0, {}

        def drawn(pipe: Any) -> Any:
            own, self.pipe = self.pipe, pipe
            try:
                return work()
            finally:
                self.pipe = own

        found, seconds, erasure = self._editable.erased(
            method, task.concepts, seed, drawn, task.exclude
        )
        if erasure is None:
            return found, seconds, {}
        report = erasure.report
        about = {
            "neighbors": sum(len(words) for words in report["neighbors"].values()),
            "rank": report["solve"]["rank"],
            "aligned": report["alignment"]["kept"],
            "stopped": report["alignment"]["stopped"],
        }
        return found, seconds, about
