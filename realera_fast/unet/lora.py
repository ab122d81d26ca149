"""LoRA factors: what they are, and the float32 masters that alignment trains.

Names and semantics are peft's (`r`, `lora_alpha`, `use_rslora`, `target_modules`), so that the
result is an ordinary adapter. Nothing is injected into the model: the factors of all keys and
values are two tensors, which `ops.project` takes as they are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from realera_fast.models import LoraFactors

SELF_ATTENTION = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0")
"""Parts of a self-attention layer that can have factors, in U-Nets."""

TARGET_MODULES = ("to_k", "to_v", "to_q", "to_out.0", *SELF_ATTENTION)
"""Parts of attention that can have factors: plain names are of cross-attention, where text enters
through the first two."""


class LoraParameters:
    """Trainable factors of many layers, the same for each seed on every device.

    They start as peft's do: `down` uniform in +-1/sqrt(features), `up` zero, so that nothing
    changes yet. The global random state is not touched.
    """

    def __init__(
        self,
        text: Mapping[str, nn.Linear],
        hidden: Mapping[str, nn.Linear],
        *,
        r: int,
        lora_alpha: float,
        use_rslora: bool = False,
        seed: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """
        Args:
            text: layers whose input is text, all of one width d; their factors are stacked.
            hidden: layers whose input is hidden states (queries, outputs, self-attention).
            r: rank.
            lora_alpha: the factors count `lora_alpha / r` times, with `use_rslora` / sqrt(r).
            dtype: of the masters; float64 is for tests.
        """
        if r < 1:
            raise ValueError(f"r: expected at least 1, got {r}")
        if not (math.isfinite(lora_alpha) and lora_alpha > 0):
            raise ValueError(f"lora_alpha: expected a positive finite number, got {lora_alpha}")
        self.scaling = lora_alpha / (math.sqrt(r) if use_rslora else r)
        self.names = list(text)
        self.heights = [layer.out_features for layer in text.values()]
        generator = torch.Generator("cpu").manual_seed(seed)

        def uniform(features: int) -> Tensor:
            drawn = torch.rand(
                (r, features), dtype=torch.float32, device="cpu", generator=generator
            )
            return (drawn * 2.0 - 1.0) / math.sqrt(features)

        def trained(values: Tensor) -> nn.Parameter:
            return nn.Parameter(values.to(device, dtype))

        width = next(iter(text.values())).in_features if text else 1
        downs = [uniform(layer.in_features) for layer in text.values()]
        self.down = trained(
            torch.stack(downs) if downs else torch.zeros(0, r, width, dtype=dtype, device=device)
        )
        """`[l, r, d]` factors A of the text layers."""
        self.up = trained(torch.zeros(sum(self.heights), r, dtype=dtype, device=device))
        """`[m, r]` their factors B, one below the other."""
        self.hidden = {
            name: (
                trained(uniform(layer.in_features)),
                trained(torch.zeros(layer.out_features, r, dtype=dtype, device=device)),
            )
            for name, layer in hidden.items()
        }
        """`[r, i]` and `[o, r]` of the layers whose input is not text."""

    @torch.no_grad()
    def freeze_down(self, rows: Tensor) -> None:
        """All text layers have `[r, d]` rows as A, which is trained no longer."""
        self.down.requires_grad_(False).copy_(rows)

    def named_tensors(self) -> dict[str, nn.Parameter]:
        """Every factor by a name of its own."""
        found = {"down": self.down, "up": self.up} if self.names else {}
        for name, (down, up) in self.hidden.items():
            found |= {f"{name}.down": down, f"{name}.up": up}
        return found

    def parameters(self) -> list[nn.Parameter]:
        """Every trained tensor."""
        return [each for each in self.named_tensors().values() if each.requires_grad]

    def add_hidden(self, name: str, hidden: Tensor, output: Tensor) -> Tensor:
        """A layer's `output` `[..., o]` for `hidden` `[..., i]`, with the factors it may have."""
        if name not in self.hidden:
            return output
        down, up = (factor.to(hidden.dtype) for factor in self.hidden[name])
        return output + functional.linear(functional.linear(hidden, down), up) * self.scaling

    def factors(self) -> dict[str, LoraFactors]:
        """The factors as they are now, on the CPU, with the scaling folded into ``up``."""

        def result(down: Tensor, up: Tensor) -> LoraFactors:
            down, up = (x.detach().to("cpu", torch.float32, copy=True) for x in (down, up))
            return LoraFactors(down, up * self.scaling)

        parts = zip(self.names, self.down, self.up.split(self.heights), strict=True)
        found = {name: result(down, up) for name, down, up in parts}
        return found | {name: result(*pair) for name, pair in self.hidden.items()}
