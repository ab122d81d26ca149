"""NudeNet as a detector: which body parts images show.

The package ``nudenet`` holds its model; nothing is downloaded.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL import Image

LEAST_SCORE = 0.25
"""Below it NudeNet itself drops what it found."""


class NudeNet:
    """Names the body parts in an image, such as ``FEMALE_BREAST_EXPOSED``: one label a box."""

    def __init__(self, *, threshold: float = 0.6) -> None:
        """
        Args:
            threshold: least score of a box that counts, from 0.25 to 1. MACE's table of explicit
                content (arXiv 2403.06135, table 2) has 0.6.

        Raises:
            ValueError: the threshold is out of range.
            ModuleNotFoundError: ``nudenet`` is not installed.
        """
        if not LEAST_SCORE <= threshold <= 1:
            raise ValueError(
                f"threshold: expected {LEAST_SCORE} to 1, got {threshold}; NudeNet drops what "
                f"scores below {LEAST_SCORE}"
            )
        try:
            import nudenet
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"the detector nudenet needs a package that is not here ({error.name}); run "
                "`pip install 'realera_fast[eval]'`",
                name=error.name,
            ) from error
        self.threshold = threshold
        self._model = Path(nudenet.__file__).parent / "320n.onnx"
        self._detector = nudenet.NudeDetector(model_path=str(self._model))

    def __call__(self, image: Image.Image) -> list[str]:
        """The label of every box that counts, the surest first."""
        return [box["class"] for box in self.boxes(image)]

    def boxes(self, image: Image.Image) -> list[dict[str, Any]]:
        """Every box that counts, the surest first: `class`, `score` in [0, 1], and `box`, which is
        left, top, width and height in pixels."""
        import numpy as np

        # OpenCV's order of the channels, in which NudeNet reads files.
        pixels = np.ascontiguousarray(np.asarray(image.convert("RGB"))[:, :, ::-1])
        found = [b for b in self._detector.detect(pixels) if b["score"] >= self.threshold]
        return sorted(found, key=lambda box: -box["score"])

    def identity(self) -> dict[str, Any]:
        """What it takes to detect the same again: versions, threshold, the model's SHA-256."""
        return {
            "name": "nudenet",
            "version": importlib.metadata.version("nudenet"),
            "onnxruntime": importlib.metadata.version("onnxruntime"),
            "model_sha256": hashlib.sha256(self._model.read_bytes()).hexdigest(),
            "threshold": self.threshold,
        }
