"""The judge of the embedded model: a small network that names what a picture shows, and how.

It was trained on renderings, never on the model's own samples, so that it cannot learn to excuse
what the model gets wrong.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from realera_fast.embedded import FOLDER, words

__all__ = ["Judge"]

SIZE = 64


def _block(fan_in: int, fan_out: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(fan_in, fan_out, 3, stride, 1, bias=False), nn.BatchNorm2d(fan_out), nn.ReLU()
    )


class Judge(nn.Module):
    """One convolutional trunk with two heads: things and styles."""

    def __init__(self) -> None:
        super().__init__()
        table = words()
        self.things = tuple(thing.name for thing in table.things)
        """Names that the first head answers with, in order."""
        self.styles = tuple(style.name for style in table.styles)
        """Names that the second head answers with, in order."""
        self.trunk = nn.Sequential(
            _block(3, 32, 2),
            _block(32, 64, 2),
            _block(64, 96, 1),
            _block(96, 128, 2),
            _block(128, 128, 1),
            nn.AdaptiveAvgPool2d(4),
            nn.Flatten(),
            nn.Dropout(0.1),
        )
        self.thing_head = nn.Linear(128 * 16, len(self.things))
        self.style_head = nn.Linear(128 * 16, len(self.styles))

    @classmethod
    def load(cls, path: str | Path | None = None) -> "Judge":
        """The trained judge: the one shipped with the library, or the file at ``path``."""
        judge = cls()
        state = load_file(FOLDER / "judge.safetensors" if path is None else path)
        values = {name: value.float() for name, value in state.items()}
        # The number of training batches that BatchNorm counts is not shipped.
        counters = {n: v for n, v in judge.state_dict().items() if n.endswith("batches_tracked")}
        judge.load_state_dict(counters | values)
        return judge.eval().requires_grad_(False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of things and styles for pictures ``[b, 3, 64, 64]`` in -1..1."""
        features = self.trunk(x)
        return self.thing_head(features), self.style_head(features)

    @torch.no_grad()
    def probabilities(self, images: Sequence[Image.Image] | Tensor) -> tuple[Tensor, Tensor]:
        """``[b, things]`` and ``[b, styles]`` probabilities.

        ``images`` are PIL pictures of any size, or a tensor ``[b, 3, 64, 64]`` in 0..1 (what the
        pipeline returns with ``output_type="pt"``).
        """
        if not isinstance(images, Tensor):
            arrays = [
                np.asarray(image.convert("RGB").resize((SIZE, SIZE)), dtype=np.float32)
                for image in images
            ]
            images = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2) / 255
        if images.ndim != 4 or tuple(images.shape[1:]) != (3, SIZE, SIZE):
            raise ValueError(f"pictures must be [b, 3, {SIZE}, {SIZE}], not {tuple(images.shape)}")
        weight = self.thing_head.weight
        self.eval()
        things, styles = self(images.to(weight) * 2 - 1)
        return things.softmax(1), styles.softmax(1)

    def classify(self, images: Sequence[Image.Image] | Tensor) -> tuple[list[str], list[str]]:
        """The thing and the style that the judge sees in each picture."""
        things, styles = self.probabilities(images)
        return (
            [self.things[i] for i in things.argmax(1).tolist()],
            [self.styles[i] for i in styles.argmax(1).tolist()],
        )
