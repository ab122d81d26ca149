"""Stand-ins for what ComfyUI has: a patcher of a model, and what makes patches of LoRA factors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class Patcher:
    """Holds weights by ComfyUI's keys and patches of each, which are added when it is read."""

    def __init__(self, weights: Mapping[str, Tensor], *, pairs: bool = True) -> None:
        """
        Args:
            pairs: a weight comes with the function that converts it, as in newer releases.
        """
        self.weights, self.pairs = dict(weights), pairs
        self.patches: dict[str, list[tuple[float, Any]]] = {}

    def clone(self) -> Patcher:
        other = Patcher(self.weights, pairs=self.pairs)
        other.patches = {key: list(patches) for key, patches in self.patches.items()}
        return other

    def get_key_patches(self, prefix: str) -> dict[str, list[Any]]:
        return {
            key: [(weight, None) if self.pairs else weight, *self.patches.get(key, ())]
            for key, weight in self.weights.items()
            if key.startswith(prefix)
        }

    def add_patches(self, patches: Mapping[str, Any], strength: float = 1.0) -> list[str]:
        taken = [key for key in patches if key in self.weights]
        for key in taken:
            self.patches.setdefault(key, []).append((strength, patches[key]))
        return taken

    def patched(self) -> dict[str, Tensor]:
        """The weights as the model runs with them."""
        found = dict(self.weights)
        for key, patches in self.patches.items():
            for strength, (up, down, alpha) in patches:
                change = strength * alpha / down.shape[0] * (up @ down)
                found[key] = (found[key].float() + change).to(found[key].dtype)
        return found


def load_lora(tensors: Mapping[str, Tensor], keys: Mapping[str, str]) -> dict[str, Any]:
    """Patches by ComfyUI's key of the layers whose factors are in the file."""
    return {
        key: (
            tensors[f"{name}.lora_up.weight"],
            tensors[f"{name}.lora_down.weight"],
            tensors[f"{name}.alpha"].item(),
        )
        for name, key in keys.items()
        if f"{name}.lora_up.weight" in tensors
    }


def in_comfyui(weights: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> Patcher:
    """A patcher of a checkpoint in the layout of the first release, or of ComfyUI's own keys."""
    return Patcher({k.removeprefix("model."): w.to(dtype, copy=True) for k, w in weights.items()})
