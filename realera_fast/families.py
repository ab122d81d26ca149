"""Architectures: which text encoders a denoiser has and how its pipeline reads them.

Which weights are edited stands in `denoiser.ENTRANCES`; what they are shown is a convention of each
pipeline, and stands here. Both are known, and tested with hooks on the stock pipelines, or the
model is refused. Who knows how another model reads text passes a `Family` of their own.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from torch import nn

from realera_fast.denoiser import (
    COMPANIONS,
    STREAMS,
    Maps,
    Stream,
    check_drawable,
    class_of,
    projections,
    streams,
    unwrapped,
)
from realera_fast.text import JoinedText, Output, Text, TextModel


@dataclass(frozen=True)
class Reading:
    """How a pipeline reads one of its text encoders."""

    encoder: int
    """Number of the encoder; -1 is the last."""
    output: Output = "last"
    max_tokens: int | None = None
    """Rows of a prompt by the pipeline's default; None is all that encoder and tokenizer hold.
    Where padding is hidden the rows of a prompt do not depend on it."""
    masked: bool = False
    """Whether padding is hidden from the encoder and from the denoiser."""
    visible_padding: int = 0
    """Rows of padding after the prompt that the denoiser is shown although the rest is hidden."""
    lowercase: bool = False
    instruction: str | Callable[[], str] = ""
    """Text in front of every prompt."""
    multi_vector: bool = False
    """Whether the pipeline expands a textual inversion of several vectors to all of its tokens."""
    model_types: tuple[str, ...] = ()
    """``config.model_type`` of the encoders that are known to be read so; empty takes any."""

    def of(self, encoders: Sequence[Any], tokenizers: Sequence[Any]) -> TextModel:
        """The encoder, read this way.

        Raises:
            ValueError: an encoder of another type.
        """
        encoder = encoders[self.encoder]
        kind = getattr(getattr(encoder, "config", None), "model_type", None)
        if self.model_types and kind and kind not in self.model_types:
            raise ValueError(
                f"text_encoders: expected a text encoder of type {' or '.join(self.model_types)}, "
                f"got {type(encoder).__name__} ({kind}): how its output is read is not known; pass "
                "reading=realera_fast.families.Family(...) if you know"
            )
        return TextModel(
            encoder,
            tokenizers[self.encoder],
            output=self.output,
            max_tokens=self.max_tokens,
            masked=self.masked,
            visible_padding=self.visible_padding,
            lowercase=self.lowercase,
            instruction=self.resolved().instruction,
            multi_vector=self.multi_vector,
            # A refiner's only encoder is the pipeline's second one.
            name="text_encoder" + {0: "", -1: "_2"}.get(self.encoder, f"_{self.encoder + 1}"),
        )

    def resolved(self) -> Any:
        """The same with its instruction as text."""
        made = self.instruction if isinstance(self.instruction, str) else self.instruction()
        return dataclasses.replace(self, instruction=made)


@dataclass(frozen=True)
class Family:
    """One architecture: where text enters the denoiser, and how its pipeline encodes prompts."""

    name: str
    sections: tuple[tuple[Reading, ...], ...]
    """What stands one after the other in the token sequence; each of encoders side by side."""
    pooled: tuple[Reading, ...] = ()
    """Pooled vectors, side by side."""
    aligned: bool = False
    """Whether the noise alignment knows how to run the denoiser."""
    padded: bool = False
    """Whether zeros fill a section up to the width that the denoiser takes."""
    maps: Maps | None = None
    """Which text each linear map of the denoiser takes, by module name, for a class that is not in
    `denoiser.ENTRANCES`; None looks there."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "sections", _listed_readings(self.sections, "sections"))
        (pooled,) = _listed_readings((self.pooled,), "pooled")
        object.__setattr__(self, "pooled", pooled)
        flags = (self.aligned, self.padded)
        if not isinstance(self.name, str) or not all(isinstance(flag, bool) for flag in flags):
            raise ValueError("reading: name is a string, aligned and padded are True or False")
        if not self.sections or not all(self.sections):
            raise ValueError("reading: sections is empty; name what the token sequence is made of")
        if any(r.output != "pooled" for r in self.pooled) or any(
            r.output == "pooled" for part in self.sections for r in part
        ):
            raise ValueError(
                "reading: output='pooled' is for the pooled vector, and for nothing else"
            )
        if self.maps is not None:
            self._check_maps(self.maps)

    def _check_maps(self, maps: Maps) -> None:
        if not isinstance(maps, Mapping):
            raise ValueError(
                "reading: maps: expected module names with 'sequence' or 'pooled', got "
                f"{type(maps).__name__}"
            )
        for name, stream in maps.items():
            if not isinstance(name, str) or stream not in STREAMS:
                raise ValueError(f"reading: maps[{name!r}] is {stream!r}, expected of {STREAMS}")
        if "sequence" not in maps.values():
            raise ValueError("reading: maps names none of the token sequence")
        if bool(self.pooled) != ("pooled" in maps.values()):
            raise ValueError("reading: maps and pooled disagree about a pooled vector")
        if self.aligned:
            raise ValueError("reading: aligned=True is for the families of this library")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `from_dict` is the inverse."""

        def plain(readings: Sequence[Reading]) -> list[dict[str, Any]]:
            return [dataclasses.asdict(reading.resolved()) for reading in readings]

        return {
            "name": self.name,
            "sections": [plain(readings) for readings in self.sections],
            "pooled": plain(self.pooled),
            "aligned": self.aligned,
            "padded": self.padded,
            "maps": None if self.maps is None else dict(self.maps),
        }

    @classmethod
    def from_dict(cls, values: Any) -> Family:
        """The inverse of `to_dict`; the values are not trusted.

        Raises:
            ValueError: they are not those of a family.
        """
        try:
            found = dict(values)
            sections = tuple(tuple(map(_reading, part)) for part in found.pop("sections"))
            pooled = tuple(map(_reading, found.pop("pooled")))
            return cls(sections=sections, pooled=pooled, **found)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"is not how a model reads text: {error}") from error

    def present(self, encoders: Sequence[Any]) -> tuple[tuple[Reading, ...], ...]:
        """The sections whose encoders are all loaded."""
        return tuple(
            readings
            for readings in self.sections
            if all(encoders[reading.encoder] is not None for reading in readings)
        )

    def explained(self) -> tuple[str, ...]:
        """For which prompts an erasure holds that was made with this reading, in sentences."""
        parts = [
            *((f"section {i} of the text", r) for i, r in enumerate(self.sections, 1)),
            *((("pooled vector", self.pooled),) if self.pooled else ()),
        ]
        return tuple(f"{self.name}, {part}: {_explained(readings)}" for part, readings in parts)


def _listed_readings(parts: Any, field: str) -> tuple[tuple[Reading, ...], ...]:
    """Readings, one tuple a section.

    Raises:
        ValueError: something else is among them.
    """
    listed = list | tuple
    if not isinstance(parts, listed) or not all(isinstance(part, listed) for part in parts):
        shape = "((Reading(0),),)" if field == "sections" else "(Reading(0, 'pooled'),)"
        raise ValueError(f"reading: {field}: expected tuples of Reading such as {shape}")
    for part in parts:
        for reading in part:
            if not isinstance(reading, Reading):
                raise ValueError(
                    f"reading: {field}: expected a Reading, got {type(reading).__name__}"
                )
            _check_reading(reading)
    return tuple(tuple(part) for part in parts)


def _reading(values: Any) -> Reading:
    found = dict(values)
    return Reading(**{**found, "model_types": tuple(found.get("model_types", ()))})


def _check_reading(reading: Reading) -> None:
    rows, last = reading.max_tokens, 1 << 16
    flags = (reading.masked, reading.lowercase, reading.multi_vector)
    typed = (
        _is_count(reading.encoder, -1, 15)
        and (rows is None or _is_count(rows, 1, last))
        and _is_count(reading.visible_padding, 0, last)
        and all(isinstance(flag, bool) for flag in flags)
        and all(isinstance(kind, str) for kind in reading.model_types)
        and (isinstance(reading.instruction, str) or callable(reading.instruction))
    )
    if not typed or reading.output not in get_args(Output):
        raise ValueError(f"reading: {reading} is not how an encoder is read")


def _is_count(value: Any, least: int, most: int) -> bool:
    return type(value) is int and least <= value <= most


def _explained(readings: Sequence[Reading]) -> str:
    """What readings side by side give, in words."""
    which = " and ".join(
        "the last text encoder" if r.encoder < 0 else f"text encoder {r.encoder + 1}"
        for r in readings
    )
    first = readings[0]
    if first.output == "pooled":
        return f"{which}, pooled"
    if first.masked:
        cleaned = ", lowercased and without caption cleaning" if first.lowercase else ""
        states = f"{first.output} states{cleaned}"
        return f"{which}, {states}; padding is hidden: any max_sequence_length"
    return (
        f"{which}, {first.output} states, {first.max_tokens or 'all'} rows; padding is in sight: "
        "prompts that are encoded at another length have other rows"
    )


def _sana_instruction() -> str:
    """What `SanaPipeline` puts before a prompt unless told otherwise."""
    from diffusers import SanaPipeline

    parameters = inspect.signature(SanaPipeline.__call__).parameters
    return "\n".join(parameters["complex_human_instruction"].default or ())


def _clip(encoder: int, output: Output = "last", *, multi_vector: bool = True) -> Reading:
    return Reading(encoder, output, multi_vector=multi_vector, model_types=("clip_text_model",))


def _masked(*model_types: str, **options: Any) -> Reading:
    # As many rows as any prompt of an erasure takes: hidden padding costs time and nothing else.
    return Reading(0, max_tokens=120, masked=True, model_types=model_types, **options)


_STABLE_DIFFUSION = Family("Stable Diffusion", ((_clip(0),),), aligned=True)
_SDXL = Family(
    "Stable Diffusion XL",
    ((_clip(0, "penultimate"), _clip(1, "penultimate")),),
    (_clip(1, "pooled"),),
    aligned=True,
)
_REFINER = Family(
    "Stable Diffusion XL refiner", ((_clip(-1, "penultimate"),),), (_clip(-1, "pooled"),)
)

FAMILIES: Mapping[str, Family] = {
    "SD3Transformer2DModel": Family(
        "Stable Diffusion 3",
        (
            tuple(_clip(number, "penultimate", multi_vector=False) for number in (0, 1)),
            (Reading(2, max_tokens=256, model_types=("t5",)),),
        ),
        tuple(_clip(number, "pooled", multi_vector=False) for number in (0, 1)),
        padded=True,
    ),
    "FluxTransformer2DModel": Family(
        "FLUX.1",
        ((Reading(1, max_tokens=512, multi_vector=True, model_types=("t5",)),),),
        (_clip(0, "pooled"),),
    ),
    "PixArtTransformer2DModel": Family("PixArt", ((_masked("t5", lowercase=True),),)),
    "SanaTransformer2DModel": Family(
        "Sana", ((_masked("gemma2", lowercase=True, instruction=_sana_instruction),),)
    ),
    "AuraFlowTransformer2DModel": Family("AuraFlow", ((_masked("umt5", "t5"),),)),
    "ChromaTransformer2DModel": Family(
        "Chroma", ((_masked("t5", visible_padding=1, multi_vector=True),),)
    ),
    "BriaTransformer2DModel": Family("Bria", ((_masked("t5"),),)),
}
"""By class name of the denoiser; U-Nets are told apart by their configuration."""


_BESIDE = {
    "SD3ControlNetModel": "SD3Transformer2DModel",
    "FluxControlNetModel": "FluxTransformer2DModel",
    "SanaControlNetModel": "SanaTransformer2DModel",
}
"""ControlNets by the denoiser whose text they are shown; others stand beside a U-Net."""


def family_of(model: nn.Module, encoders: int = 1) -> Family:
    """The architecture of a denoiser.

    Args:
        encoders: how many text encoders it has; tells SDXL's refiner from SDXL.

    Raises:
        ValueError: its class or configuration is not supported.
    """
    streams(model)
    model = unwrapped(model)
    kind = class_of(model)
    if (known := FAMILIES.get(_BESIDE.get(kind, kind))) is not None:
        return known
    if getattr(getattr(model, "config", None), "addition_embed_type", None) == "text_time":
        return _SDXL if encoders > 1 else _REFINER
    return _STABLE_DIFFUSION


def as_read(
    family: Family, encoders: Sequence[Any], texts: Mapping[Stream, Sequence[Text]]
) -> Family:
    """The family with the sections that are there and the rows that they really have.

    Args:
        encoders: the text encoders in the order of the pipeline.
        texts: what `text_streams` made of them.
    """

    def sized(readings: Sequence[Reading], text: Text) -> tuple[Reading, ...]:
        parts: Sequence[Any] = text.parts if isinstance(text, JoinedText) else (text,)
        return tuple(
            dataclasses.replace(reading, max_tokens=part.rows)
            for reading, part in zip(readings, parts, strict=True)
        )

    sections = zip(family.present(encoders), texts["sequence"], strict=True)
    return dataclasses.replace(
        family,
        sections=tuple(sized(readings, text) for readings, text in sections),
        pooled=sized(family.pooled, texts["pooled"][0]) if "pooled" in texts else (),
    )


def why_not_aligned(model: nn.Module, family: Family, latent_size: int | None) -> str | None:
    """Why noise alignment does not run on a model, as a clause; None where it does.

    Args:
        latent_size: height and width of the latents, if the caller knows them.
    """
    if not family.aligned:
        return f"{family.name} has the closed form alone"
    try:
        check_drawable(model, latent_size)
    except ValueError as error:
        return str(error).removeprefix("model: ")
    return None


def text_streams(
    model: nn.Module, text_encoders: Any, tokenizers: Any = None, reading: Family | None = None
) -> dict[Stream, tuple[Text, ...]]:
    """What a denoiser is shown of a prompt, by stream: sections of the sequence, the pooled vector.

    Args:
        model: the denoiser.
        text_encoders: one, or a tuple in the order of the pipeline (``text_encoder``,
            ``text_encoder_2``, ...); None stands for one that was not loaded (SD3 without T5).
        tokenizers: their tokenizers, one each; `None` looks beside the encoders' own files.
        reading: how the model reads text, where the caller knows it; None is `family_of`.

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
    family = family_of(model, len(encoders)) if reading is None else reading
    numbers = {r.encoder for part in (*family.sections, family.pooled) for r in part}
    wanted = max(numbers) + 1 if max(numbers) >= 0 else 1
    # A caller's reading may leave out encoders, such as one that is not loaded.
    if len(encoders) < wanted or (reading is None and len(encoders) != wanted):
        raise ValueError(
            f"text_encoders: expected {wanted} for {family.name}, got {len(encoders)}; pass "
            f"{'one' if wanted == 1 else 'a tuple'} in the order of the pipeline, None for one "
            "that is not loaded"
        )
    kinds = streams(model, family.maps)
    if "pooled" in kinds.values() and not family.pooled:
        raise ValueError(
            f"reading: {type(unwrapped(model)).__name__} takes a pooled vector of the text as "
            "well; name it in pooled, such as (Reading(0, 'pooled'),)"
        )
    width = None
    if family.padded:
        entry = next(name for name, kind in kinds.items() if kind == "sequence")
        width = projections(model, family.maps)[entry].in_features
    result: dict[Stream, tuple[Text, ...]] = {}
    sections = [_joined(readings, encoders, found, width) for readings in family.present(encoders)]
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
        ValueError: a part beside the denoiser is shown the prompt as well, or may be.
    """
    name = component_name(pipe)
    model = getattr(pipe, name)
    _refuse_companions(pipe, name, model)
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
        if not all(class_of(unwrapped(net)) in COMPANIONS for net in nets):
            raise ValueError(told + "not supported")
        each = f"pipe.{part}" if nets == (module,) else f"net for each net of pipe.{part}.nets"
        net = each.split(" ")[0]
        raise ValueError(
            f"{told}one call edits one model. Erase from the {name}, "
            f"erasure = realera_fast.erase(pipe.{name}, text_encoders, concepts, tokenizer=..., "
            f"scheduler=pipe.scheduler), and then the same from {each}: "
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
