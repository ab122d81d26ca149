"""The judge of the embedded model: a small network that names what a picture shows, and how.

It was trained on renderings, never on the model's own samples, so that it cannot learn to excuse
what the model gets wrong.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from realera_fast.embedded import FOLDER, Words, words

__all__ = ["JUNK", "NOTHING", "Judge", "Sight"]

SIZE = 64
JUNK = "junk"
"""What is seen in smears, half things and blends."""
NOTHING = "nothing"
"""What is seen in a picture of no thing."""
THRESHOLD = 0.5


@dataclass(frozen=True)
class Sight:
    """What the judge sees in one picture."""

    things: tuple[str, ...]
    """Names of the things that are there, the clearest first."""
    style: str
    junk: bool
    """Whether there is a smear, a half thing or a blend of things."""

    @property
    def name(self) -> str:
        """The clearest thing, ``JUNK`` where the picture is that, or ``NOTHING``."""
        if self.junk:
            return JUNK
        return self.things[0] if self.things else NOTHING


def _block(fan_in: int, fan_out: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(fan_in, fan_out, 3, stride, 1, bias=False), nn.BatchNorm2d(fan_out), nn.ReLU()
    )


class Judge(nn.Module):
    """One convolutional trunk that looks for every thing at 16 places, and for the style."""

    def __init__(self, table: Words | None = None) -> None:
        super().__init__()
        table = words() if table is None else table
        self.things = tuple(thing.name for thing in table.things)
        """Names of the first outputs, in order; ``JUNK`` comes after them."""
        self.styles = tuple(style.name for style in table.styles)
        """Names of the second output, in order."""
        self.trunk = nn.Sequential(
            _block(3, 48, 2),
            _block(48, 96, 2),
            _block(96, 128, 1),
            _block(128, 192, 2),
            _block(192, 192, 1),
            _block(192, 256, 2),
        )
        self.thing_head = nn.Conv2d(256, len(self.things) + 1, 1)
        self.style_head = nn.Linear(256, len(self.styles))

    @classmethod
    def load(cls, path: str | Path | None = None, table: Words | None = None) -> "Judge":
        """The trained judge: the one shipped with the library, or the file at ``path``, of the
        things and styles of ``table``."""
        judge = cls(table)
        state = load_file(FOLDER / "judge.safetensors" if path is None else path)
        values = {name: value.float() for name, value in state.items()}
        # The number of training batches that BatchNorm counts is not shipped.
        counters = {n: v for n, v in judge.state_dict().items() if n.endswith("batches_tracked")}
        judge.load_state_dict(counters | values)
        return judge.eval().requires_grad_(False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of things and junk ``[b, things + 1]``, each its own yes or no, and of styles
        ``[b, styles]``, one of which is, for pictures ``[b, 3, 64, 64]`` in -1..1."""
        features = self.trunk(x)
        places = self.thing_head(features).flatten(2)
        return places.float().logsumexp(2), self.style_head(features.mean((2, 3)))

    @torch.no_grad()
    def probabilities(self, images: Sequence[Image.Image] | Tensor) -> tuple[Tensor, Tensor]:
        """``[b, things + 1]`` (junk last; each in 0..1 by itself) and ``[b, styles]``.

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
        weight = self.style_head.weight
        self.eval()
        things, styles = self(images.to(weight) * 2 - 1)
        return things.sigmoid(), styles.softmax(1)

    def look(self, images: Sequence[Image.Image] | Tensor) -> list[Sight]:
        """What is seen in each picture: every thing that is there, the style, and junk."""
        if not len(images):
            return []
        things, styles = self.probabilities(images)
        sights = []
        for chances, style in zip(things, styles.argmax(1).tolist(), strict=True):
            order = chances[:-1].argsort(descending=True, stable=True).tolist()
            there = tuple(self.things[i] for i in order if chances[i] >= THRESHOLD)
            junk = chances[-1].item() >= THRESHOLD
            sights.append(Sight(there, self.styles[style], junk))
        return sights

    def classify(self, images: Sequence[Image.Image] | Tensor) -> tuple[list[str], list[str]]:
        """The clearest thing (or ``JUNK``, or ``NOTHING``) and the style of each picture."""
        sights = self.look(images)
        return [sight.name for sight in sights], [sight.style for sight in sights]
