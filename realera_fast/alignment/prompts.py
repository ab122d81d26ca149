"""What noise alignment is given of the words: trained on, checked and preserved."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

from torch import Tensor

from realera_fast.text import AlignedPrompts
from realera_fast.unet import SharedDenoiser, Variant


class Prompts(Protocol):
    """Prompts of all words, encoded when asked for; the named words come first."""

    named: int

    def __len__(self) -> int: ...

    def __getitem__(self, number: int) -> AlignedPrompts: ...


Attacked: TypeAlias = Callable[[SharedDenoiser, Variant], float]
"""How near to its concepts an attack on a variant of the model comes (`AlignmentScore.worst`)."""


@dataclass(frozen=True)
class AlignmentPrompts:
    """What the stage trains on, checks and preserves."""

    trained: Prompts
    """Of the words that the user named, then of mined neighbors."""
    watched: Prompts
    """Of the words that the check looks at: named ones, then words near them, mined or not."""
    preserve: Tensor
    """`[p, t, d]` prompts that keep their prediction."""
    empty: Tensor
    """`[1, t, d]` embedding of the empty prompt, for guidance."""
    attacked: Attacked | None = None
    """Attacks a variant of the model; where there is none, the worst neighbor stands for it."""
    latents: Mapping[str, Tensor] = field(default_factory=dict)
    """`[n, c, h, w]` encoded images by word, as the denoiser takes them; z_t of these words is
    noised from them in place of a trajectory."""
    zero_rows: int = 0
    """Rows of zeros that the pipeline shows behind each prompt (`models.Family.absent_rows`)."""
