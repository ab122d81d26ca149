"""The weights that text enters a denoiser through: find them, identify them, guard them.

They are *the first linear maps that the text encoders' output meets*. What comes after them then
sees edited text, whatever it is, and nothing else has to change. `ENTRANCES` names them for each
class of diffusers for which tests have shown, with hooks, that these maps see the rows that the
pipeline encodes and that text has no other way in. No other class is edited, unless the caller says
how it reads text (`families.Family.maps`).

Models are duck-typed: nothing here imports diffusers, accelerate or peft, but their ways to make a
weight that looks editable and isn't (fused projections, adapters, offloading, quantization) are
known and refused with a message that says what to do.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from realera_fast.models.dense import Target
from realera_fast.models.refusals import (
    RefusedModelError,
    check_alike,
    check_apart,
    check_attention,
    check_config,
    check_layer,
    check_places,
    check_readable,
    check_way,
    forward_class,
    refuse_adapters,
)
from realera_fast.runtime import refuse_offloading, unwrapped

Stream = Literal["sequence", "pooled"]
"""How text enters: as a sequence of token embeddings, or as one vector a prompt."""

STREAMS: tuple[Stream, ...] = ("sequence", "pooled")

Maps = Mapping[str, Stream]
"""Which text each text-conditioned linear map takes, by module name."""


@dataclass(frozen=True)
class Entrance:
    """Where text enters the models of one class."""

    sequence: str | None = None
    """Map of the token sequence; None: ``to_k`` and ``to_v`` of every cross-attention layer."""
    pooled: str | None = None
    """Map of the pooled vector, where the class takes one."""
    optional: bool = False
    """Whether a model of the class may lack the map of the sequence."""


_UNET = Entrance(pooled="add_embedding.linear_1")
_JOINT = Entrance("context_embedder", "time_text_embed.text_embedder.linear_1")
_CAPTION = Entrance("caption_projection.linear_1")
_COG = Entrance("patch_embed.text_proj")
_WAN = Entrance("condition_embedder.text_embedder.linear_1")

ENTRANCES: Mapping[str, Entrance] = {
    "UNet2DConditionModel": _UNET,
    "UNetMotionModel": _UNET,
    "UNetControlNetXSModel": _UNET,
    "UNet3DConditionModel": Entrance(),
    "SD3Transformer2DModel": _JOINT,
    "FluxTransformer2DModel": _JOINT,
    "AuraFlowTransformer2DModel": Entrance("context_embedder"),
    "ChromaTransformer2DModel": Entrance("context_embedder"),
    "BriaTransformer2DModel": Entrance("context_embedder"),
    "PixArtTransformer2DModel": _CAPTION,
    "SanaTransformer2DModel": _CAPTION,
    "AllegroTransformer3DModel": _CAPTION,
    "LTXVideoTransformer3DModel": _CAPTION,
    "LatteTransformer3DModel": _CAPTION,
    "SanaVideoTransformer3DModel": _CAPTION,
    "WanTransformer3DModel": _WAN,
    "WanVACETransformer3DModel": _WAN,
    "SkyReelsV2Transformer3DModel": _WAN,
    "CogVideoXTransformer3DModel": _COG,
    "CogView3PlusTransformer2DModel": _COG,
    "CogView4Transformer2DModel": _COG,
    "Flux2Transformer2DModel": Entrance("context_embedder"),
    "Lumina2Transformer2DModel": Entrance("time_caption_embed.caption_embedder.1"),
    "QwenImageTransformer2DModel": Entrance("txt_in"),
    "ZImageTransformer2DModel": Entrance("cap_embedder.1"),
}
"""Denoisers by class name. How their pipelines encode text stands in `families`."""

COMPANIONS: Mapping[str, Entrance] = {
    "ControlNetModel": _UNET,
    "ControlNetUnionModel": _UNET,
    "SD3ControlNetModel": Entrance(_JOINT.sequence, _JOINT.pooled, optional=True),
    "FluxControlNetModel": _JOINT,
    "SanaControlNetModel": _CAPTION,
}
"""Models that stand beside a denoiser and are shown the same text: what was learned for the
denoiser serves them (`Erasure.rebase`)."""

UNSUPPORTED: Mapping[str, str] = {
    "BriaFiboTransformer2DModel": "every block is shown another layer of its text encoder",
    "CosmosTransformer3DModel": "its pipelines differ in how they encode text, one in a text "
    "conditioner of its own",
    "Flux3Transformer2DModel": "several layers of its text encoder stand side by side in each row",
    "HeliosTransformer3DModel": "text passes condition_embedder.text_embedder before the attention",
    "HiDreamImageTransformer2DModel": "each block is shown another layer of its text encoder, "
    "through a map of its own that needs an edit of its own",
    "HunyuanDiT2DModel": "its pooler adds positions to the text before it meets a map",
    "HunyuanVideoFramepackTransformer3DModel": "a token refiner of its own reads the text first",
    "HunyuanVideoTransformer3DModel": "a token refiner of its own reads the text first",
    "Kandinsky3UNet": "encoder_hid_proj and add_time_condition read the text first",
    "LTX2VideoTransformer3DModel": "the pipeline's connectors read the text first",
    "LongCatImageTransformer2DModel": "a vision-language model encodes a chat template",
    "MotifVideoTransformer3DModel": "a token refiner of its own reads the text first",
    "OmniGenTransformer2DModel": "it is a language model that reads the prompt's tokens itself",
    "OvisImageTransformer2DModel": "its pipeline hides an instruction in the chat's message, which "
    "is not tested",
    "PriorTransformer": "it predicts picture embeddings, from which another model draws",
    "StableCascadeUNet": "text passes clip_txt_mapper and clip_txt_pooled_mapper first",
    "UNetSpatioTemporalConditionModel": "it takes a picture and no text",
}
"""Why some well-known classes are refused."""


def stream_of(name: str) -> Stream | None:
    """Which text a layer of that module name takes in a class of `ENTRANCES`; None if none."""
    return "sequence" if name.endswith((".to_k", ".to_v")) else _STREAM_OF.get(name)


_STREAM_OF: Mapping[str, Stream] = {
    **{known.sequence: "sequence" for known in ENTRANCES.values() if known.sequence},
    **{known.pooled: "pooled" for known in ENTRANCES.values() if known.pooled},
}


def class_of(model: nn.Module) -> str:
    """Name of the class of diffusers that decides how a model computes.

    A subclass counts as the class whose `forward` it runs, so one that replaces it is none of
    diffusers.
    """
    kind = forward_class(model)
    package = kind.__module__.split(".")[0]
    name = type(model).__name__
    return kind.__name__ if package == "diffusers" else f"{name} (its forward is of {package})"


def streams(model: nn.Module, maps: Maps | None = None) -> dict[str, Stream]:
    """Which text each text-conditioned linear map of a model takes, by module name.

    Only the structure counts: the weights may be on the meta device. The text's features are the
    first columns of a weight; where there are more (SDXL's ``add_embedding``), they are not text.

    Args:
        model: a diffusers U-Net or transformer, or a ControlNet of `COMPANIONS`.
        maps: what the caller knows of a model of another class; believed, as far as the layers
            exist.

    Raises:
        TypeError: `model` is not a module.
        ValueError: its class or configuration is not supported.
    """
    if not isinstance(model, nn.Module):
        name = next((n for n in ("unet", "transformer") if hasattr(model, n)), "unet")
        inner = getattr(model, name, None)
        hint = f"; pass pipe.{name}" if isinstance(inner, nn.Module) else ""
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}{hint}")
    model = unwrapped(model)
    if type(model).__name__ == "FullyShardedDataParallel":
        raise ValueError(
            "model: its weights are sharded (FullyShardedDataParallel), so no process can edit "
            "them; erase before wrapping it"
        )
    if maps is not None:
        for name in maps:
            with suppress(AttributeError):
                model.get_submodule(name)
                continue
            raise ValueError(
                f"reading: it names the map {name!r}, which {type(model).__name__} does not have"
            )
        return dict(maps)
    kind = class_of(model)
    entrance = ENTRANCES.get(kind) or COMPANIONS.get(kind)
    if entrance is None:
        # A model that peft wrapped is one of another class until it is unloaded.
        refuse_adapters(model)
        why = f" ({UNSUPPORTED[kind]})" if kind in UNSUPPORTED else ""
        raise RefusedModelError(
            f"model: {kind} is not supported{why}; {', '.join(ENTRANCES)} are",
            ". If you know how its pipeline reads text, pass "
            "reading=realera_fast.models.Family(...)",
        )
    config = getattr(model, "config", None)
    check_config(config)
    if getattr(model, "text_encoder_hid_proj", None) is not None:
        # An IP-Adapter moves there what encoder_hid_dim_type named before.
        raise ValueError(
            "model: its text_encoder_hid_proj transforms the text embeddings first, which is not "
            "supported"
        )
    found: dict[str, Stream] = {}
    if entrance.sequence is None:
        for name, module in model.named_modules():
            if getattr(module, "is_cross_attention", False):
                found |= {f"{name}.to_k": "sequence", f"{name}.to_v": "sequence"}
        if not found:
            raise ValueError(f"model: this {kind} has no cross-attention, so it takes no text")
    elif getattr(model, entrance.sequence.split(".")[0], None) is not None:
        found[entrance.sequence] = "sequence"
    elif not entrance.optional:
        raise ValueError(
            f"model: this {kind} has no {entrance.sequence.split('.')[0]}, so it takes no text"
        )
    if entrance.pooled is not None and (
        entrance is not _UNET or getattr(config, "addition_embed_type", None) == "text_time"
    ):
        found[entrance.pooled] = "pooled"
    return found


def check_drawable(model: nn.Module, latent_size: int | None) -> None:
    """Refuses a denoiser that needs more than a prompt to draw, or draws in an unknown size.

    Args:
        latent_size: height and width of the latents, if the caller knows them.

    Raises:
        ValueError: not a U-Net of Stable Diffusion, an image or class beside the text, no size.
    """
    model = unwrapped(model)
    if all(kind.__name__ != "UNet2DConditionModel" for kind in type(model).__mro__):
        raise ValueError(f"model: {type(model).__name__} is not a UNet2DConditionModel")
    options: Any = model.config
    if options.in_channels != options.out_channels:
        raise ValueError(
            f"model: it takes {options.in_channels} channels and gives {options.out_channels} "
            "(inpainting?)"
        )
    beside = ("class_embed_type", "num_class_embeds", "encoder_hid_dim_type", "time_cond_proj_dim")
    for name in beside:
        if getattr(options, name, None):
            raise ValueError(
                f"model: it takes more than text and noise ({name}={getattr(options, name)!r})"
            )
    if not (latent_size or options.sample_size):
        raise ValueError("model: its config has no sample_size; name AlignmentConfig.latent_size")


def check_runnable(model: nn.Module) -> None:
    """Refuses a denoiser in a state in which it does not run as it stands.

    Raises:
        ValueError: it is cast layer by layer, or moved whenever it runs.
    """
    model = unwrapped(model)
    for name, module in model.named_modules():
        if "layerwise_casting" in getattr(getattr(module, "_diffusers_hook", None), "hooks", {}):
            raise ValueError(
                f"model: layerwise casting gives {name or 'it'} another dtype while it runs (load "
                "it without enable_layerwise_casting, in the dtype that it computes in)"
            )
    moved = getattr(getattr(model, "_hf_hook", None), "execution_device", None)
    if moved is not None and torch.device(moved).type != next(model.parameters()).device.type:
        raise ValueError(
            f"model: it is moved to {moved} whenever it runs (undo that with "
            f"pipe.remove_all_hooks() and pipe.to('{moved}'))"
        )


def check_trainable(model: nn.Module) -> None:
    """Refuses a denoiser that no gradient goes through.

    Raises:
        ValueError: a tensor of it was made in inference mode.
    """
    inner = unwrapped(model)
    for name, tensor in (*inner.named_parameters(), *inner.named_buffers()):
        if tensor.is_inference():
            raise ValueError(
                f"model: {name} was made under torch.inference_mode(), so that nothing can be "
                "trained through it (load the model outside of it, or copy it there: pipe.unet = "
                "copy.deepcopy(pipe.unet))"
            )


def projections(
    model: nn.Module,
    maps: Maps | None = None,
    *,
    as_run: bool = True,
    target: Target = "weights",
) -> dict[str, nn.Linear]:
    """The text-conditioned linear maps of a denoiser, checked to be editable.

    Args:
        model: a diffusers U-Net or transformer, or a ControlNet of `COMPANIONS`.
        maps: what the caller knows of a model of another class (`streams`).
        as_run: whether the model must also run them as they stand. To read or undo an edit, what a
            processor, hook or replaced ``forward`` adds does not matter.
        target: "weights" are edited in place; for an "adapter" they need to be readable alone, in
            any dtype (`dense_weight`).

    Returns:
        Module name to ``nn.Linear``, those of the token sequence first, in the order of the module
        tree; see `streams`. Those of the sequence share their width; to be edited in place, all
        share dtype and device.

    Raises:
        TypeError: `model` is not a module, or is a whole pipeline.
        ValueError: text enters nowhere, or weights that an edit would not (or not correctly) reach.
    """
    kinds = streams(model, maps)
    model = unwrapped(model)
    refuse_adapters(model)
    adapted = 'leave it as it is: target="adapter"'
    refuse_offloading(model, "model", readable=target == "adapter", otherwise=adapted)
    own = {id(p) for name, p in model.named_parameters() if ".processor." not in name}
    found: dict[str, nn.Linear] = {}
    for name in kinds:
        if "_orig_mod" in name.split("."):
            raise ValueError(
                f"model: {name} is in a part that torch.compile wraps, under another name than in "
                "the files of the model; compile the whole model, or parts in place: part.compile()"
            )
        parent, _, leaf = name.rpartition(".")
        owner: Any = None
        with suppress(AttributeError):
            owner = model.get_submodule(parent)
        if getattr(owner, "is_cross_attention", False) and leaf == "to_k":
            check_attention(parent, owner, own if as_run else None)
        check = check_layer if target == "weights" else check_readable
        found[name] = check(name, getattr(owner, leaf, None))
        if as_run:
            check_way(model, name, known=maps is None)
    widths = {layer.in_features: name for name, layer in found.items() if kinds[name] == "sequence"}
    if len(widths) > 1:
        listed = ", ".join(f"{width} ({name})" for width, name in widths.items())
        raise ValueError(f"model: its text projections must share one text width, got {listed}")
    if target == "weights":
        check_alike(found)
        check_apart(model, found)
    else:
        check_places(model, found)
    return found


def queries_and_outputs(model: nn.Module, *, target: Target = "weights") -> dict[str, nn.Linear]:
    """``to_q`` and ``to_out.0`` of each cross-attention layer, which never see the text itself.

    No closed form reaches them; factors of alignment may. Checked like `projections`, which `model`
    must pass.

    Raises:
        ValueError: a layer that an edit would not (or not correctly) reach.
    """
    found: dict[str, nn.Linear] = {}
    check = check_layer if target == "weights" else check_readable
    for name, module in unwrapped(model).named_modules():
        if getattr(module, "is_cross_attention", False):
            found[f"{name}.to_q"] = check(f"{name}.to_q", module.to_q)
            output = module.to_out[0] if module.to_out is not None else None
            found[f"{name}.to_out.0"] = check(f"{name}.to_out.0", output)
    if target == "adapter":
        return found
    check_alike(projections(model, as_run=False) | found)
    check_apart(unwrapped(model), found)
    return found


def self_attention(model: nn.Module, *, target: Target = "weights") -> dict[str, nn.Linear]:
    """``to_q``, ``to_k``, ``to_v`` and ``to_out.0`` of each self-attention layer of a U-Net.

    They see pictures alone. Factors of alignment may be on them. Checked like `projections`, which
    `model` must pass.

    Raises:
        ValueError: there is none, or a layer that an edit would not (or not correctly) reach.
    """
    found: dict[str, nn.Linear] = {}
    check = check_layer if target == "weights" else check_readable
    for name, module in unwrapped(model).named_modules():
        if name.rpartition(".")[2] != _SELF_ATTENTION:
            continue
        if getattr(module, "is_cross_attention", False):
            raise ValueError(
                f"model: text enters its {name} (only_cross_attention), so that it is no "
                "self-attention; name projections of cross-attention: to_k, to_v, to_q, to_out.0"
            )
        check_attention(name, module, None)
        for leaf in ("to_q", "to_k", "to_v", "to_out.0"):
            found[f"{name}.{leaf}"] = check(f"{name}.{leaf}", module.get_submodule(leaf))
    if not found:
        raise ValueError(f"model: this {type(unwrapped(model)).__name__} has no self-attention")
    if target == "adapter":
        return found
    check_alike(projections(model, as_run=False) | found)
    check_apart(unwrapped(model), found)
    return found


def is_self_attention(name: str) -> bool:
    """Whether a layer of that module name is one of `self_attention`, in a model that has them."""
    return f".{_SELF_ATTENTION}." in name


_SELF_ATTENTION = "attn1"
"""What the transformer blocks of U-Nets call it, unless text enters there."""


def check_width(model: nn.Module, stream: Stream, width: int, maps: Maps | None = None) -> None:
    """Raises ValueError unless the maps of a stream take text of that many features."""
    layers = projections(model, maps, as_run=False, target="adapter")
    takes = {n: layers[n].in_features for n, kind in streams(model, maps).items() if kind == stream}
    for name, features in takes.items():
        # Beside the pooled text stand embedded sizes and crops, five or six numbers (SDXL).
        size = getattr(getattr(unwrapped(model), "config", None), "addition_time_embed_dim", 0) or 0
        beside = (5 * size, 6 * size) if name.startswith("add_embedding") else (0,)
        if features - width not in beside:
            raise ValueError(
                f"text_encoders: their embeddings have width {width}, but the model's {name} takes "
                f"{features}; pass the text encoders of this model"
            )
