"""Architectures: which text encoders a denoiser has and how its pipeline reads them.

Which weights are edited follows from one rule (`denoiser.streams`); what they are shown is a
convention of each pipeline. A transformer that is not listed is read by rule: one encoder, its last
hidden states, padding hidden.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from realera_fast.denoiser import Stream, projections, streams, unwrapped
from realera_fast.text import JoinedText, Output, Text, TextModel


@dataclass(frozen=True)
class Reading:
    """How a pipeline reads one of its text encoders."""

    encoder: int
    """Number of the encoder; -1 is the last."""
    output: Output = "last"
    max_tokens: int | None = None
    """Rows of a prompt by the pipeline's default; None is all that encoder and tokenizer hold."""
    masked: bool = False
    lowercase: bool = False
    instruction: Callable[[], str] = str
    """Text in front of every prompt."""

    def of(self, encoders: Sequence[Any], tokenizers: Sequence[Any]) -> TextModel:
        """The encoder, read this way."""
        return TextModel(
            encoders[self.encoder],
            tokenizers[self.encoder],
            output=self.output,
            max_tokens=self.max_tokens,
            masked=self.masked,
            lowercase=self.lowercase,
            instruction=self.instruction(),
            # A refiner's only encoder is the pipeline's second one.
            name="text_encoder" + {0: "", -1: "_2"}.get(self.encoder, f"_{self.encoder + 1}"),
        )


@dataclass(frozen=True)
class Family:
    """One architecture."""

    name: str
    sections: tuple[tuple[Reading, ...], ...]
    """What stands one after the other in the token sequence; each of encoders side by side."""
    pooled: tuple[Reading, ...] = ()
    """Pooled vectors, side by side."""
    aligned: bool = False
    """Whether the noise alignment knows how to run the denoiser."""
    padded: bool = False
    """Whether zeros fill a section up to the width that the denoiser takes."""


def _sana_instruction() -> str:
    """What `SanaPipeline` puts before a prompt unless told otherwise."""
    from diffusers import SanaPipeline

    parameters = inspect.signature(SanaPipeline.__call__).parameters
    return "\n".join(parameters["complex_human_instruction"].default or ())


_STABLE_DIFFUSION = Family("Stable Diffusion", ((Reading(0),),), aligned=True)
_SDXL = Family(
    "Stable Diffusion XL",
    ((Reading(0, "penultimate"), Reading(1, "penultimate")),),
    (Reading(1, "pooled"),),
    aligned=True,
)
_REFINER = Family(
    "Stable Diffusion XL refiner",
    ((Reading(-1, "penultimate"),),),
    (Reading(-1, "pooled"),),
)

FAMILIES: Mapping[str, Family] = {
    "SD3Transformer2DModel": Family(
        "Stable Diffusion 3",
        (
            (Reading(0, "penultimate"), Reading(1, "penultimate")),
            (Reading(2, max_tokens=256),),
        ),
        (Reading(0, "pooled"), Reading(1, "pooled")),
        padded=True,
    ),
    "FluxTransformer2DModel": Family(
        "FLUX.1", ((Reading(1, max_tokens=512),),), (Reading(0, "pooled"),)
    ),
    "PixArtTransformer2DModel": Family(
        "PixArt", ((Reading(0, max_tokens=120, masked=True, lowercase=True),),)
    ),
    "SanaTransformer2DModel": Family(
        "Sana",
        (
            (
                Reading(
                    0,
                    max_tokens=120,
                    masked=True,
                    lowercase=True,
                    instruction=_sana_instruction,
                ),
            ),
        ),
    ),
}
"""By class name of the denoiser; U-Nets are told apart by their configuration."""

_BY_RULE = Family("by rule", ((Reading(0, max_tokens=120, masked=True),),))


def family_of(model: nn.Module, encoders: int = 1) -> Family:
    """The architecture of a denoiser.

    Args:
        encoders: how many text encoders it has; tells SDXL's refiner from SDXL.
    """
    model = unwrapped(model)
    if getattr(getattr(model, "config", None), "addition_embed_type", None) == "text_time":
        return _SDXL if encoders > 1 else _REFINER
    if (known := FAMILIES.get(type(model).__name__)) is not None:
        return known
    kinds = streams(model)
    # Cross-attention on the encoder's output itself is what all U-Nets have.
    return _STABLE_DIFFUSION if any(n.endswith(".to_k") for n in kinds) else _BY_RULE


def text_streams(
    model: nn.Module, text_encoders: Any, tokenizers: Any = None
) -> dict[Stream, tuple[Text, ...]]:
    """What a denoiser is shown of a prompt, by stream: sections of the sequence, the pooled vector.

    Args:
        model: the denoiser.
        text_encoders: one, or a tuple in the order of the pipeline (``text_encoder``,
            ``text_encoder_2``, ...); None stands for one that was not loaded (SD3 without T5).
        tokenizers: their tokenizers, one each; `None` looks beside the encoders' own files.

    Raises:
        ValueError: too many or too few of them, or widths that the model does not take.
    """
    encoders = _listed(text_encoders)
    found = list(tokenizers) if isinstance(tokenizers, tuple | list) else [tokenizers]
    if tokenizers is None:
        found = [None] * len(encoders)
    if len(found) != len(encoders):
        raise ValueError(
            f"tokenizer: expected one for each of {len(encoders)} text encoders, got {len(found)}"
        )
    family = family_of(model, len(encoders))
    numbers = {r.encoder for part in (*family.sections, family.pooled) for r in part}
    wanted = max(numbers) + 1 if max(numbers) >= 0 else 1
    if len(encoders) != wanted:
        raise ValueError(
            f"text_encoders: expected {wanted} for {family.name}, got {len(encoders)}; pass "
            f"{'one' if wanted == 1 else 'a tuple'} in the order of the pipeline, None for one "
            "that is not loaded"
        )
    kinds = streams(model)
    width = None
    if family.padded:
        entry = next(name for name, kind in kinds.items() if kind == "sequence")
        width = projections(model)[entry].in_features
    result: dict[Stream, tuple[Text, ...]] = {}
    sections = [
        _joined(readings, encoders, found, width)
        for readings in family.sections
        if all(encoders[reading.encoder] is not None for reading in readings)
    ]
    if not sections:
        raise ValueError(f"text_encoders: {family.name} needs at least one, got none")
    result["sequence"] = tuple(sections)
    if family.pooled and "pooled" in kinds.values():
        missing = [r.encoder for r in family.pooled if encoders[r.encoder] is None]
        if missing:
            raise ValueError(
                f"text_encoders: {family.name} takes a pooled vector of encoder {missing[0]}, "
                "which is None"
            )
        result["pooled"] = (_joined(family.pooled, encoders, found, None),)
    return result


def _listed(text_encoders: Any) -> list[Any]:
    return list(text_encoders) if isinstance(text_encoders, tuple | list) else [text_encoders]


def _joined(
    readings: Sequence[Reading],
    encoders: Sequence[Any],
    tokenizers: Sequence[Any],
    width: int | None,
) -> Text:
    """The encoders side by side, with zeros up to `width` where one is given."""
    parts = [reading.of(encoders, tokenizers) for reading in readings]
    own = sum(part.width for part in parts)
    if len(parts) == 1 and width in (None, own):
        return parts[0]
    return JoinedText(parts, width)


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
    """
    name = component_name(pipe)
    numbers = [n for n in ("", "_2", "_3") if getattr(pipe, f"text_encoder{n}", None) is not None]
    if not numbers:
        raise TypeError(
            f"pipe: {type(pipe).__name__} has no text encoder; load the pipeline with it"
        )
    # A refiner has no first encoder; SD3 without T5 has no third one, and keeps its place.
    declared = [n for n in ("", "_2", "_3") if hasattr(pipe, f"text_encoder{n}")]
    config = getattr(unwrapped(getattr(pipe, name)), "config", None)
    if getattr(config, "addition_embed_type", None) == "text_time":
        declared = numbers
    return Components(
        getattr(pipe, name),
        tuple(getattr(pipe, f"text_encoder{n}") for n in declared),
        tuple(getattr(pipe, f"tokenizer{n}", None) for n in declared),
        getattr(pipe, "scheduler", None),
    )


def component_name(pipe: Any) -> str:
    """ "unet" or "transformer": what a pipeline calls its denoiser."""
    for name in ("unet", "transformer"):
        if isinstance(getattr(pipe, name, None), nn.Module):
            return name
    raise TypeError(
        "pipe: expected a diffusers text-to-image pipeline with a unet or a transformer, got "
        f"{type(pipe).__name__}"
    )


def is_pipeline(value: Any) -> bool:
    """Whether it is a pipeline, not a denoiser."""
    if isinstance(value, nn.Module):
        return False
    return any(isinstance(getattr(value, n, None), nn.Module) for n in ("unet", "transformer"))
