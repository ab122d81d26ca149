"""The parts of a pipeline: denoiser, text encoders, scheduler."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from realera_fast.models.entrances import (
    COMPANIONS,
    class_of,
)
from realera_fast.runtime import unwrapped

BESIDE = {
    "SD3ControlNetModel": "SD3Transformer2DModel",
    "FluxControlNetModel": "FluxTransformer2DModel",
    "SanaControlNetModel": "SanaTransformer2DModel",
}
"""ControlNets by the denoiser whose text they are shown; others stand beside a U-Net."""


@dataclass(frozen=True)
class Components:
    """What an erasure needs of a pipeline."""

    model: nn.Module
    text_encoders: tuple[Any, ...]
    tokenizers: tuple[Any, ...]
    scheduler: Any


def components_of(pipe: Any) -> Components:
    """The parts of a diffusers pipeline, classic or modular.

    Raises:
        TypeError: it is none, or has no denoiser with text encoders.
        ValueError: a part beside the denoiser is shown the prompt as well, or may be; or the text
            encoder is shown a picture with it.
    """
    name = component_name(pipe)
    model = getattr(pipe, name)
    _refuse_companions(pipe, name, model)
    if getattr(pipe, "processor", None) is not None and class_of(unwrapped(model)) in _WITH_PICTURE:
        raise ValueError(
            f"pipe: {type(pipe).__name__} shows its text encoder a picture before the prompt, and "
            "other instructions: which rows that gives is not known here. Erase from the pipeline "
            "that draws from text alone, or pass the parts and a reading= of your own"
        )
    numbers = [n for n in ("", "_2", "_3") if getattr(pipe, f"text_encoder{n}", None) is not None]
    if not numbers:
        raise TypeError(
            f"pipe: {type(pipe).__name__} has no text encoder (text_encoder, text_encoder_2, "
            "text_encoder_3); a pipeline that takes no text has nothing to erase, one that was "
            "loaded without it must be loaded with it"
        )
    # A refiner has no first encoder; SD3 without T5 has no third one, and keeps its place.
    declared = [n for n in ("", "_2", "_3") if hasattr(pipe, f"text_encoder{n}")]
    config = getattr(unwrapped(model), "config", None)
    if getattr(config, "addition_embed_type", None) == "text_time":
        declared = numbers
    return Components(
        model,
        tuple(getattr(pipe, f"text_encoder{n}") for n in declared),
        tuple(getattr(pipe, f"tokenizer{n}", None) for n in declared),
        getattr(pipe, "scheduler", None),
    )


_WITHOUT_TEXT = (
    *("text_encoder", "text_encoder_2", "text_encoder_3", "image_encoder", "image_normalizer"),
    *("vae", "vqgan", "vqvae", "movq", "vocoder", "safety_checker", "depth_estimator"),
    "caption_generator",
)
"""Parts of pipelines, by name, that are shown no prompt but as it is known here."""

_WITH_PICTURE = ("QwenImageTransformer2DModel",)
"""Denoisers whose pipelines for editing, which have a processor, show pictures to the encoder."""

_ADAPTERS = ("T2IAdapter", "MultiAdapter", "MotionAdapter")
"""Adapters of diffusers that are shown no prompt either."""


def _refuse_companions(pipe: Any, name: str, model: nn.Module) -> None:
    """Refuses a pipeline with a part that is shown the prompt beside the denoiser."""
    parts = getattr(pipe, "components", None)
    parts = dict(parts) if isinstance(parts, Mapping) else dict(vars(pipe))
    for part, module in parts.items():
        if not isinstance(module, nn.Module) or part in (name, *_WITHOUT_TEXT):
            continue
        module = unwrapped(module)
        if class_of(module) in _ADAPTERS:
            continue
        # What it holds was copied into the denoiser, which alone is run.
        if class_of(unwrapped(model)) == "UNetControlNetXSModel" and part == "controlnet":
            continue
        own = type(module).__name__
        told = (
            f"pipe: its {part} ({own}) is shown the prompt beside the {name}, or may be, and would "
            "keep what is erased from that: "
        )
        nets = getattr(module, "nets", (module,))
        # Of two denoisers one draws the first steps, the other the rest (Wan 2.2).
        known = {*COMPANIONS, *([class_of(unwrapped(model))] if part == f"{name}_2" else [])}
        if not all(class_of(unwrapped(net)) in known for net in nets):
            raise ValueError(told + "not supported")
        each = f"pipe.{part}" if nets == (module,) else f"net for each net of pipe.{part}.nets"
        net = each.split(" ")[0]
        raise ValueError(
            f"{told}one call edits one model. Erase from the {name}, "
            f"erasure = realera_fast.erase(pipe.{name}, text_encoders, concepts, tokenizer=..., "
            "scheduler=pipe.scheduler, config=...) with EraseConfig(closed_form=ClosedFormConfig("
            f'space="text")), and then the same from {each}: '
            f"erasure.rebase({net}).apply_({net})"
        )


_DENOISERS = ("unet", "transformer")


def component_name(pipe: Any) -> str:
    """ "unet" or "transformer": what a pipeline calls its denoiser."""
    for name in _DENOISERS:
        if isinstance(getattr(pipe, name, None), nn.Module):
            return name
    parts = getattr(pipe, "components", None)
    held = [k for k, v in dict(parts).items() if isinstance(v, nn.Module)] if parts else []
    raise TypeError(
        "pipe: expected a diffusers text-to-image pipeline with a unet or a transformer, got "
        f"{type(pipe).__name__}"
        + (f", whose parts are {', '.join(held)}: not supported" if held else "")
    )


def is_pipeline(value: Any) -> bool:
    """Whether it is a pipeline, not a denoiser."""
    if isinstance(value, nn.Module):
        return False
    named = any(isinstance(getattr(value, n, None), nn.Module) for n in _DENOISERS)
    return named or isinstance(getattr(value, "components", None), Mapping)
