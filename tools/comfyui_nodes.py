"""Nodes of ComfyUI that apply an erasure. Copy this file into ComfyUI/custom_nodes, and install
realera_fast into ComfyUI's Python.

"Apply Erasure" puts a delta on a model; "Erase Prompt" maps a conditioning and leaves the model as
it is.
"""

from __future__ import annotations

from typing import Any

from realera_fast import Erasure
from realera_fast.erasure import comfyui_conditioning, comfyui_model
from realera_fast.solver import PromptMap, is_prompt_map

DELTA = ("STRING", {"default": "", "tooltip": "erasure.safetensors, which realera-fast wrote"})


class ApplyErasure:
    """A model and a delta to the model that the concept was erased from."""

    CATEGORY = "realera_fast"
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "apply"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        strength = {"default": 1.0, "min": 0.0, "max": 2.0, "step": 0.05}
        return {"required": {"model": ("MODEL",), "delta": DELTA, "strength": ("FLOAT", strength)}}

    def apply(self, model: Any, delta: str, strength: float) -> tuple[Any]:
        import comfy.lora

        return (comfyui_model(model, Erasure.load(delta), comfy.lora.load_lora, strength),)


class ErasePrompt:
    """A conditioning and a delta to the conditioning without the concept. Map the negative prompt
    as well. With a gated prompt map (`PromptMap.save`) for a delta, prompts without the concept
    stay as they are."""

    CATEGORY = "realera_fast"
    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "erase"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"conditioning": ("CONDITIONING",), "delta": DELTA}}

    def erase(self, conditioning: Any, delta: str) -> tuple[Any]:
        load = PromptMap.load if is_prompt_map(delta) else Erasure.load
        return (comfyui_conditioning(conditioning, load(delta)),)


NODE_CLASS_MAPPINGS = {"RealeraApplyErasure": ApplyErasure, "RealeraErasePrompt": ErasePrompt}
NODE_DISPLAY_NAME_MAPPINGS = {
    "RealeraApplyErasure": "Apply Erasure",
    "RealeraErasePrompt": "Erase Prompt",
}
