"""Architectures: which text encoders a denoiser has and how its pipeline reads them.

Which weights are edited stands in `entrances.ENTRANCES`; what they are shown is a convention of
each pipeline, and stands here. Both are known, and tested with hooks on the stock pipelines, or the
model is refused. Who knows how another model reads text passes a `Family` of their own.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from realera_fast.models.components import BESIDE
from realera_fast.models.dense import Target
from realera_fast.models.entrances import (
    Maps,
    Stream,
    class_of,
    projections,
    queries_and_outputs,
    streams,
)
from realera_fast.models.joint_attention import check_alignable, is_joint
from realera_fast.models.reading import Family, Reading
from realera_fast.models.refusals import check_way
from realera_fast.runtime import unwrapped
from realera_fast.text import JoinedText, Output, Text


def _instruction_of(pipeline: str) -> str:
    """What a pipeline of Sana puts before a prompt unless told otherwise."""
    import diffusers

    parameters = inspect.signature(getattr(diffusers, pipeline).__call__).parameters
    return "\n".join(parameters["complex_human_instruction"].default or ())


def _sana(name: str, pipeline: str) -> Family:
    instruction = functools.partial(_instruction_of, pipeline)
    return Family(name, ((_masked("gemma2", lowercase=True, instruction=instruction),),))


def _flux2_system() -> str:
    """The system message of `Flux2Pipeline`."""
    from diffusers.pipelines.flux2.system_messages import SYSTEM_MESSAGE

    return str(SYSTEM_MESSAGE)


_QWEN_SYSTEM = (
    "Describe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background:"
)
_LUMINA_SYSTEM = (
    "You are an assistant designed to generate superior images with the superior degree of "
    "image-text alignment based on textual prompts or user prompts."
)
"""What `QwenImagePipeline` and `Lumina2Pipeline` say to their text encoders before a prompt."""


def _clip(encoder: int, output: Output = "last", *, multi_vector: bool = True) -> Reading:
    return Reading(encoder, output, multi_vector=multi_vector, model_types=("clip_text_model",))


def _masked(*model_types: str, **options: Any) -> Reading:
    # As many rows as any prompt of an erasure takes: hidden padding costs time and nothing else.
    options.setdefault("max_tokens", 120)
    return Reading(0, masked=True, model_types=model_types, **options)


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

_FLUX2_DEV = Family(
    "FLUX.2 dev",
    (
        (
            Reading(
                0,
                layers=(10, 20, 30),
                max_tokens=512,
                encoder_mask=True,
                instruction=_flux2_system,
                chat={"add_generation_prompt": False},
                model_types=("mistral3",),
            ),
        ),
    ),
)
_FLUX2_KLEIN = Family(
    "FLUX.2 klein",
    (
        (
            Reading(
                0,
                layers=(9, 18, 27),
                max_tokens=512,
                encoder_mask=True,
                chat={"add_generation_prompt": True, "enable_thinking": False},
                model_types=("qwen3",),
            ),
        ),
    ),
)

FAMILIES: Mapping[str, Family] = {
    "SD3Transformer2DModel": Family(
        "Stable Diffusion 3",
        (
            tuple(_clip(number, "penultimate", multi_vector=False) for number in (0, 1)),
            (Reading(2, max_tokens=256, model_types=("t5",)),),
        ),
        tuple(_clip(number, "pooled", multi_vector=False) for number in (0, 1)),
        aligned=True,
        padded=True,
    ),
    "FluxTransformer2DModel": Family(
        "FLUX.1",
        ((Reading(1, max_tokens=512, multi_vector=True, model_types=("t5",)),),),
        (_clip(0, "pooled"),),
        aligned=True,
    ),
    "PixArtTransformer2DModel": Family("PixArt", ((_masked("t5", lowercase=True),),)),
    "SanaTransformer2DModel": _sana("Sana", "SanaPipeline"),
    "AuraFlowTransformer2DModel": Family("AuraFlow", ((_masked("umt5", "t5"),),)),
    "ChromaTransformer2DModel": Family(
        "Chroma", ((_masked("t5", visible_padding=1, multi_vector=True),),)
    ),
    "BriaTransformer2DModel": Family("Bria", ((_masked("t5"),),)),
    "AllegroTransformer3DModel": Family("Allegro", ((_masked("t5", lowercase=True),),)),
    "LTXVideoTransformer3DModel": Family(
        "LTX-Video",
        ((Reading(0, max_tokens=128, masked=True, encoder_mask=False, model_types=("t5",)),),),
    ),
    "LatteTransformer3DModel": Family("Latte", ((_masked("t5", lowercase=True),),)),
    "SanaVideoTransformer3DModel": _sana("Sana Video", "SanaVideoPipeline"),
    "WanTransformer3DModel": Family("Wan", ((_masked("umt5", clean=True),),)),
    "WanVACETransformer3DModel": Family("Wan VACE", ((_masked("umt5", clean=True),),)),
    "SkyReelsV2Transformer3DModel": Family("SkyReels V2", ((_masked("umt5", clean=True),),)),
    "CogVideoXTransformer3DModel": Family(
        "CogVideoX", ((Reading(0, max_tokens=226, model_types=("t5",)),),)
    ),
    "CogView3PlusTransformer2DModel": Family(
        "CogView3-Plus", ((Reading(0, max_tokens=224, model_types=("t5",)),),)
    ),
    "CogView4Transformer2DModel": Family(
        "CogView4",
        ((_masked("glm", output="penultimate", encoder_mask=False, front_padding=16),),),
    ),
    "Flux2Transformer2DModel": _FLUX2_DEV,
    "Lumina2Transformer2DModel": Family(
        "Lumina 2",
        (
            (
                _masked(
                    "gemma2",
                    output="penultimate",
                    instruction=f"{_LUMINA_SYSTEM} <Prompt Start> ",
                    dropped=0,
                    max_tokens=200,
                ),
            ),
        ),
        norm="time_caption_embed.caption_embedder.0",
    ),
    "QwenImageTransformer2DModel": Family(
        "Qwen-Image",
        (
            (
                _masked(
                    "qwen2_5_vl",
                    instruction=f"<|im_start|>system\n{_QWEN_SYSTEM}<|im_end|>\n<|im_start|>user\n",
                    suffix="<|im_end|>\n<|im_start|>assistant\n",
                    dropped=34,
                ),
            ),
        ),
        norm="txt_norm",
    ),
    "ZImageTransformer2DModel": Family(
        "Z-Image",
        (
            (
                _masked(
                    "qwen3",
                    output="penultimate",
                    chat={"add_generation_prompt": True, "enable_thinking": True},
                    max_tokens=160,
                ),
            ),
        ),
        norm="cap_embedder.0",
    ),
}
"""By class name of the denoiser; U-Nets and FLUX.2 are told apart by their configuration."""


def family_of(model: nn.Module, encoders: int = 1) -> Family:
    """The architecture of a denoiser.

    Args:
        encoders: how many text encoders it has; tells SDXL's refiner from SDXL.

    Raises:
        ValueError: its class or configuration is not supported.
    """
    streams(model)
    model = unwrapped(model)
    kind, config = class_of(model), getattr(model, "config", None)
    if kind == "Flux2Transformer2DModel" and not getattr(config, "guidance_embeds", True):
        return _FLUX2_KLEIN
    if (known := FAMILIES.get(BESIDE.get(kind, kind))) is not None:
        return known
    if getattr(config, "addition_embed_type", None) == "text_time":
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


def why_not_run(model: nn.Module, maps: Maps | None = None) -> str | None:
    """Why a denoiser that an adapter can be made for is not run here, as a clause; None where it
    is: its weights are ordinary ones.

    Args:
        maps: what the caller knows of a model of another class.
    """
    try:
        projections(model, maps)
    except ValueError as error:
        return str(error).removeprefix("model: ")
    return None


def why_not_aligned(
    model: nn.Module, family: Family, latent_size: int | None, target: Target = "weights"
) -> str | None:
    """Why noise alignment does not run on a model, as a clause; None where it does.

    Args:
        latent_size: height and width of the latents, if the caller knows them.
        target: what the erasure is written to; of the weights it is known that they can be edited.
    """
    if not family.aligned:
        return f"{family.name} has the closed form alone"
    try:
        check_alignable(model, latent_size)
        if target == "adapter":
            if (clause := why_not_run(model, family.maps)) is not None:
                return clause
            if not is_joint(model):
                queries_and_outputs(model)
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
        width = projections(model, family.maps, target="adapter")[entry].in_features
    result: dict[Stream, tuple[Text, ...]] = {}
    norm = _norm_of(model, family)
    sections = [
        _joined(readings, encoders, found, width, norm) for readings in family.present(encoders)
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
        result["pooled"] = (_joined(family.pooled, encoders, found),)
    return result


def _norm_of(model: nn.Module, family: Family) -> nn.Module | None:
    """The module that the token sequence passes before its map, checked to run as it stands."""
    if family.norm is None:
        return None
    model = unwrapped(model)
    try:
        norm = model.get_submodule(family.norm)
    except AttributeError:
        raise ValueError(
            f"reading: it names the norm {family.norm!r}, which {type(model).__name__} does not "
            "have"
        ) from None
    check_way(model, family.norm, known=family.maps is None)
    return norm


def _listed(text_encoders: Any) -> list[Any]:
    return list(text_encoders) if isinstance(text_encoders, tuple | list) else [text_encoders]


def _joined(
    readings: Sequence[Reading],
    encoders: Sequence[Any],
    tokenizers: Sequence[Any],
    width: int | None = None,
    norm: nn.Module | None = None,
) -> Text:
    """The encoders side by side, with zeros up to `width` where one is given."""
    parts = [reading.of(encoders, tokenizers, norm) for reading in readings]
    own = sum(part.width for part in parts)
    if len(parts) == 1 and width in (None, own):
        return parts[0]
    return JoinedText(parts, width)
