"""What alignment and attacks ask of a denoiser: one module, run as three variants of itself."""

from __future__ import annotations

import contextlib
import threading
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from realera_fast.unet.lora import LoraParameters

FP16_SCALE = 2.0**14
"""Half precision holds no gradient below 6e-8: it travels scaled."""

Variant = Literal["original", "edited", "aligned"]
"""What one denoiser is run as: its own weights; the closed form; that with LoRA factors."""


class SharedDenoiser(Protocol):
    """Runs a denoiser as each of its variants; its weights are never touched.

    Predictions are what its scheduler asks for: noise, velocity or sample of a diffusion model, the
    velocity of a flow.
    """

    lora: LoraParameters
    device: torch.device
    dtype: torch.dtype
    """What it computes in."""
    gradient_scale: float
    """What a loss is multiplied with before its gradient is taken, and that divided by."""

    def installed(self) -> contextlib.AbstractContextManager[None]:
        """For the length of the block the model can be run by the methods below."""
        ...

    def condition(self, states: Tensor, variant: Variant) -> Any:
        """`[b, t, d]` prompts as the variant sees them, for `predict`."""
        ...

    def predict(self, latents: Tensor, timesteps: Tensor, prompts: Any) -> Tensor:
        """`[b, c, h, w]` prediction, float32 or wider, for latents of that shape and `[b]` time
        steps. Backward has to be done before the next call."""
        ...

    def error_gradient(
        self, latents: Tensor, timesteps: Tensor, states: Tensor, goal: Tensor, variant: Variant
    ) -> tuple[Tensor, Tensor]:
        """`[b]` mean squared errors of predictions and a goal `[b, c, h, w]`, and `[b, t, d]`
        float32 the gradient of each with respect to its prompt."""
        ...


def is_own_call(thread: int) -> bool:
    """Whether the thread that installed a `SharedDenoiser` runs a layer now, not someone who draws
    in another one."""
    if torch.compiler.is_compiling() or threading.get_ident() == thread:
        return True
    # Recomputed layers run in the threads of the backward pass.
    return bool(torch._C._current_graph_task_id() != -1)
