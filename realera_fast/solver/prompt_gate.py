"""Which prompts hold a concept: the gate of a prompt map (docs/method.md, section 4)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class PromptGate(nn.Module):
    """Opens for prompts with a row that points where a row of an erased word does.

    A row's score is its greatest cosine with the directions, both seen from the mean row of text
    that stays. One product serves all concepts. Everything is a float32 buffer.
    """

    center: Tensor
    directions: Tensor
    thresholds: Tensor

    def __init__(self, center: Tensor, directions: Tensor, thresholds: Tensor) -> None:
        """
        Args:
            center: `[d]` mean row.
            directions: `[n, d]` rows of erased words less the mean row; any length but 0.
            thresholds: `[n]` cosine from which each opens, that of its concept.

        Raises:
            ValueError: shapes that don't fit, or directions of no length.
        """
        super().__init__()
        if (
            directions.dim() != 2
            or center.shape != directions.shape[1:]
            or thresholds.shape != directions.shape[:1]
        ):
            raise ValueError(
                "center, directions, thresholds: expected shapes [d], [n, d] and [n], got "
                f"{list(center.shape)}, {list(directions.shape)} and {list(thresholds.shape)}"
            )
        lengths = directions.float().norm(dim=1, keepdim=True)
        if not bool((lengths > 0).all()):
            raise ValueError("directions: one is zero, or not a number: it points nowhere")
        self.register_buffer("center", center.float())
        self.register_buffer("directions", directions.float() / lengths)
        self.register_buffer("thresholds", thresholds.float())

    def cosines(self, prompt_embeds: Tensor) -> Tensor:
        """`[b, n]` float32: of each direction the greatest cosine with a row of each prompt.

        Args:
            prompt_embeds: `[b, t, d]` of any floating dtype. A row of zeros is none; without rows
                it is -1.
        """
        width = self.center.shape[0]
        if prompt_embeds.dim() != 3 or prompt_embeds.shape[2] != width:
            raise ValueError(
                f"prompt_embeds: a gate needs whole prompts, expected shape [b, t, {width}], got "
                f"{list(prompt_embeds.shape)}"
            )
        device = prompt_embeds.device
        kind = device.type if torch.amp.is_autocast_available(device.type) else "cpu"
        with torch.autocast(kind, enabled=False):
            rows = prompt_embeds.float()
            # Pipelines put zeros where there is no text.
            absent = (rows == 0).all(dim=2, keepdim=True)
            rows = nn.functional.normalize(rows - self.center.to(device, torch.float32), dim=2)
            found = rows @ self.directions.to(device, torch.float32).mT
            found = found.masked_fill(absent, -1.0)
        lowest = found.new_full((found.shape[0], 1, found.shape[2]), -1.0)
        return torch.cat((found, lowest), 1).amax(dim=1)

    def forward(self, prompt_embeds: Tensor) -> Tensor:
        """`[b]` bool, which of `[b, t, d]` prompts hold a concept."""
        reached = self.cosines(prompt_embeds)
        return (reached >= self.thresholds.to(reached.device, torch.float32)).any(dim=1)
