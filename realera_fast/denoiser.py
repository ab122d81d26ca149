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

import functools
import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FunctionType, MethodType, ModuleType
from typing import Any, Literal

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)

Stream = Literal["sequence", "pooled"]
"""How text enters: as a sequence of token embeddings, or as one vector a prompt."""

STREAMS: tuple[Stream, ...] = ("sequence", "pooled")

Maps = Mapping[str, Stream]
"""Which text each text-conditioned linear map takes, by module name."""

_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""Weights that can be edited, widest first."""


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
    "AllegroTransformer3DModel": "its pipeline lowercases the prompt, which is not tested",
    "BriaFiboTransformer2DModel": "every block is shown another layer of its text encoder",
    "CogVideoXTransformer3DModel": "text and video share one sequence behind patch_embed.text_proj",
    "CogView3PlusTransformer2DModel": "text and picture share one sequence behind patch_embed",
    "CogView4Transformer2DModel": "text and picture share one sequence behind patch_embed",
    "CosmosTransformer3DModel": "its pipelines differ in how they encode text, one in a text "
    "conditioner of its own",
    "Flux2Transformer2DModel": "three layers of its text encoder stand side by side in each row",
    "Flux3Transformer2DModel": "several layers of its text encoder stand side by side in each row",
    "HeliosTransformer3DModel": "text passes condition_embedder.text_embedder before the attention",
    "HunyuanDiT2DModel": "two text encoders are embedded and pooled by layers of their own first",
    "HunyuanVideoFramepackTransformer3DModel": "a token refiner of its own reads the text first",
    "HunyuanVideoTransformer3DModel": "a token refiner of its own reads the text first",
    "Kandinsky3UNet": "encoder_hid_proj and add_time_condition read the text first",
    "LTX2VideoTransformer3DModel": "the pipeline's connectors read the text first",
    "LTXVideoTransformer3DModel": "its pipeline encodes without a mask, which is not tested",
    "LatteTransformer3DModel": "its pipeline lowercases the prompt, which is not tested",
    "LongCatImageTransformer2DModel": "a vision-language model encodes a chat template",
    "Lumina2Transformer2DModel": "a norm stands before the map that text meets",
    "MotifVideoTransformer3DModel": "a token refiner of its own reads the text first",
    "OmniGenTransformer2DModel": "it is a language model that reads the prompt's tokens itself",
    "OvisImageTransformer2DModel": "a norm stands before the map that text meets",
    "PriorTransformer": "it predicts picture embeddings, from which another model draws",
    "QwenImageTransformer2DModel": "a norm stands before the map that text meets",
    "SanaVideoTransformer3DModel": "its pipeline has an instruction of its own, not tested",
    "SkyReelsV2Transformer3DModel": "text passes condition_embedder.text_embedder before the "
    "attention",
    "StableCascadeUNet": "text passes clip_txt_mapper and clip_txt_pooled_mapper first",
    "UNetSpatioTemporalConditionModel": "it takes a picture and no text",
    "WanTransformer3DModel": "text passes condition_embedder.text_embedder before the attention",
    "WanVACETransformer3DModel": "text passes condition_embedder.text_embedder before the "
    "attention",
    "ZImageTransformer2DModel": "a norm stands before the map that text meets",
}
"""Why some well-known classes are refused."""


class RefusedModelError(ValueError):
    """A model that can't be edited, and what else may be done about it before `erase` alone."""

    def __init__(self, told: str, before_erasing: str) -> None:
        super().__init__(told)
        self.before_erasing = before_erasing
        """Goes on where the message ends."""


def unwrapped(model: nn.Module) -> nn.Module:
    """The module itself where ``torch.compile`` or data parallelism wrapped it; else `model`."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and type(model).__name__ in ("DistributedDataParallel", "DataParallel"):
            inner = model.module
        if inner is None:
            return model
        model = inner


def stream_of(name: str) -> Stream | None:
    """Which text a layer of that module name takes in a class of `ENTRANCES`; None if none."""
    if name.endswith((".to_k", ".to_v", "context_embedder", "caption_projection.linear_1")):
        return "sequence"
    if name.endswith(("text_embedder.linear_1", "add_embedding.linear_1")):
        return "pooled"
    return None


def class_of(model: nn.Module) -> str:
    """Name of the class of diffusers that decides how a model computes.

    A subclass counts as the class whose `forward` it runs, so one that replaces it is none of
    diffusers.
    """
    kind = _forward_of(model)
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
            "reading=realera_fast.families.Family(...)",
        )
    config = getattr(model, "config", None)
    _check_config(config)
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


_HARMLESS: Mapping[str, tuple[Any, ...]] = {
    "encoder_hid_dim_type": (None, "ip_image_proj"),
    "addition_embed_type": (None, "text_time"),
    # Labels and numbers are no text; a vector may be one.
    "class_embed_type": (None, "timestep"),
    "attention_type": (None, "default"),
    "dual_cross_attention": (None, False),
}
"""Settings of a U-Net, and the values with which nothing but the text itself carries text."""


def _check_config(config: Any) -> None:
    """Refuses a configuration with a way in for text that the table does not know."""
    for name, allowed in _HARMLESS.items():
        value = getattr(config, name, None)
        if value not in allowed:
            raise ValueError(
                f"model: its {name}={value!r} gives text another way in, which is not supported"
            )


def check_drawable(model: nn.Module, latent_size: int | None) -> None:
    """Refuses a denoiser that needs more than a prompt to draw, or draws in an unknown size.

    Args:
        latent_size: height and width of the latents, if the caller knows them.

    Raises:
        ValueError: not a U-Net of Stable Diffusion, a picture or class beside the text, no size.
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
    model: nn.Module, maps: Maps | None = None, *, as_run: bool = True
) -> dict[str, nn.Linear]:
    """The text-conditioned linear maps of a denoiser, checked to be editable in place.

    Args:
        model: a diffusers U-Net or transformer, or a ControlNet of `COMPANIONS`.
        maps: what the caller knows of a model of another class (`streams`).
        as_run: whether the model must also run them as they stand. To read or undo an edit, what a
            processor, hook or replaced ``forward`` adds does not matter.

    Returns:
        Module name to ``nn.Linear``, those of the token sequence first, in the order of the module
        tree; see `streams`. All share dtype and device, and those of the sequence their width.

    Raises:
        TypeError: `model` is not a module, or is a whole pipeline.
        ValueError: text enters nowhere, or weights that an edit would not (or not correctly) reach.
    """
    kinds = streams(model, maps)
    model = unwrapped(model)
    refuse_adapters(model)
    refuse_offloading(model, "model")
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
            _check_attention(parent, owner, own if as_run else None)
        found[name] = _checked(name, getattr(owner, leaf, None))
        if as_run:
            _check_way(model, name, known=maps is None)
    widths = {layer.in_features: name for name, layer in found.items() if kinds[name] == "sequence"}
    if len(widths) > 1:
        listed = ", ".join(f"{width} ({name})" for width, name in widths.items())
        raise ValueError(f"model: its text projections must share one text width, got {listed}")
    _check_alike(found)
    _check_apart(model, found)
    return found


def queries_and_outputs(model: nn.Module) -> dict[str, nn.Linear]:
    """``to_q`` and ``to_out.0`` of each cross-attention layer, which never see the text itself.

    No closed form reaches them; adapters may. Checked like `projections`, which `model` must pass.

    Raises:
        ValueError: a layer that an edit would not (or not correctly) reach.
    """
    found: dict[str, nn.Linear] = {}
    for name, module in unwrapped(model).named_modules():
        if getattr(module, "is_cross_attention", False):
            found[f"{name}.to_q"] = _checked(f"{name}.to_q", module.to_q)
            output = module.to_out[0] if module.to_out is not None else None
            found[f"{name}.to_out.0"] = _checked(f"{name}.to_out.0", output)
    _check_alike(projections(model, as_run=False) | found)
    _check_apart(unwrapped(model), found)
    return found


def _check_alike(layers: Mapping[str, nn.Linear]) -> None:
    """Refuses weights of different kinds, or with values that no edit survives."""
    for what, value in (
        ("dtype", lambda layer: layer.weight.dtype),
        ("device", lambda layer: layer.weight.device),
    ):
        kinds = {value(layer): name for name, layer in layers.items()}
        if len(kinds) > 1:
            listed = ", ".join(f"{kind} ({name})" for kind, name in kinds.items())
            raise ValueError(
                f"model: its text projections must share one {what}, got {listed}; call "
                "model.to(...) first"
            )
    # One reduction for all layers: a check of each in turn would wait for the GPU each time.
    finite = torch.stack([layer.weight.detach().isfinite().all() for layer in layers.values()])
    if not finite.all():
        bad = [name for name, ok in zip(layers, finite.tolist(), strict=True) if not ok]
        raise ValueError(
            f"model: {bad[0]}.weight holds NaN or infinity"
            + (f" (and {len(bad) - 1} more projections)" if len(bad) > 1 else "")
            + "; reload the model"
        )


def _check_apart(model: nn.Module, layers: Mapping[str, nn.Linear]) -> None:
    """Refuses weights that share memory: an edit of one would be an edit of another as well."""
    edited = {f"{name}.weight" for name in layers}
    # Every name of a parameter: a layer that stands in two places has two.
    places = []
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.layout == torch.strided and parameter.numel() and not parameter.is_meta:
            first = parameter.data_ptr()
            steps = zip(parameter.shape, parameter.stride(), strict=True)
            last = sum((size - 1) * stride for size, stride in steps)
            stop = first + (last + 1) * parameter.itemsize
            places.append((str(parameter.device), first, stop, name))
            if name in edited and last + 1 < parameter.numel():
                raise ValueError(
                    f"model: {name} holds one value in several places (an expanded tensor), so it "
                    "can't be edited; give it values of its own: weight.data = weight.data.clone()"
                )
    places.sort()
    before: dict[str, tuple[int, str]] = {}
    for device, first, stop, name in places:
        reached, other = before.get(device, (0, ""))
        if first < reached and (name in edited or other in edited):
            raise ValueError(
                f"model: {other} and {name} share memory, so that an edit of one is an edit of the "
                "other; put copy.deepcopy(layer) in one of the two places"
            )
        if stop > reached:
            before[device] = (stop, name)


def refuse_adapters(model: nn.Module, *, before_erasing: bool = False) -> None:
    """Refuses a model whose layers have adapters around them.

    Args:
        before_erasing: whether merging an adapter is an answer too. Where weights have to be those
            of an earlier time, it is none.

    Raises:
        ValueError: it has some; says how to take them out.
    """
    model = unwrapped(model)
    wrapped = {name: m for name, m in model.named_modules() if hasattr(m, "base_layer")}
    if not wrapped:
        return
    name, layer = next(iter(wrapped.items()))
    attached: Any = getattr(model, "peft_config", None)
    what = f"an adapter wraps {name}"
    if attached:
        what = f"an adapter is attached ({', '.join(map(repr, attached))})"
    if hasattr(model, "merge_and_unload"):
        inner: Any = model
        place = "unet" if "UNet" in type(inner.get_base_model()).__name__ else "transformer"
        unload, merge = f"pipe.{place} = pipe.{place}.unload()", "merge_and_unload() in its place"
    elif hasattr(model, "unload_lora"):
        unload = "pipe.unload_lora_weights()"
        merge = "pipe.fuse_lora(), then pipe.unload_lora_weights()"
    else:
        unload = merge = "diffusers.utils.peft_utils.recurse_remove_peft_layers(model)"
    if before_erasing and merge != unload:
        raise ValueError(
            f"model: {what}; unload it first ({unload}) and load it again afterwards, or make it a "
            f"part of the model ({merge})"
        )
    if getattr(layer, "merged", False):
        raise ValueError(
            f"model: {what} and fused into the weights; take it out first (pipe.unfuse_lora(), "
            f"then {unload}). Fusing rounds, so restore_(model, force=True) may be what undoes an "
            "erasure then"
        )
    raise ValueError(f"model: {what}; unload it first ({unload}); it can be loaded again then")


def refuse_offloading(model: nn.Module, argument: str) -> None:
    """Refuses a model whose weights are elsewhere, or come and go.

    Args:
        argument: what the caller calls the model.

    Raises:
        ValueError: some are offloaded.
    """
    for name, module in model.named_modules():
        hook = getattr(module, "_hf_hook", None)
        offloads = any(getattr(h, "offload", False) for h in getattr(hook, "hooks", (hook,)))
        # diffusers keeps its own hooks, by name, in a registry on the module.
        registry = getattr(getattr(module, "_diffusers_hook", None), "hooks", {})
        if offloads or any("offload" in key for key in registry):
            raise ValueError(
                f"{argument}: the weights of {name or 'the model'} are offloaded, so that they "
                "can't be read and changed here; erase before enabling offloading, or reload the "
                "model without it"
            )


def _check_way(model: nn.Module, name: str, *, known: bool) -> None:
    """Refuses a map that text does not reach, or that is not run, as the classes say.

    Args:
        known: whether the model is of a class whose way of reading text is known.
    """
    places = name.split(".")
    for count in range(len(places) + 1):
        place = ".".join(places[:count])
        module = model.get_submodule(place)
        what = _replaced(module)
        # The model itself is called with the text: who hooks it changes the prompt, not the model.
        hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
        if what is None and place and hooks:
            what = f"it has the forward hook {_name_of(hooks[0])}"
        if what is not None:
            raise ValueError(
                f"model: {place or 'the model'} is not run as it stands: {what}. What that adds "
                "(an adapter of kohya or LyCORIS, a compiled engine, a recorder) would not be "
                "erased with it; remove it before the call, and set it up again afterwards"
            )
        source = _forward_of(module).__module__
        if known and not source.startswith(("diffusers.", "torch.nn.")):
            raise ValueError(
                f"model: {place} is a {type(module).__name__}, a class that is not of diffusers, "
                "so it is not known what text it shows its layers; undo that (a patch for speed?) "
                "before the call, and do it again afterwards"
            )


def _forward_of(module: nn.Module) -> type:
    """The class whose `forward` a module runs."""
    return next(kind for kind in type(module).__mro__ if "forward" in vars(kind))


_HOOKS = ("accelerate.", "diffusers.hooks.")
"""Packages that replace a forward to move weights; what matters of it is refused elsewhere."""


def _replaced(module: nn.Module) -> str | None:
    """What a module runs in place of its class's `forward`, in words; None where it runs that."""
    registry = getattr(module, "_diffusers_hook", None)
    kept = [getattr(part, "original_forward", None) for part in getattr(registry, "_fn_refs", ())]
    for forward in (vars(module).get("forward"), getattr(module, "_old_forward", None), *kept):
        inner = getattr(forward, "func", forward)
        of_class = getattr(inner, "__func__", None) is _forward_of(module).__dict__["forward"]
        if forward is None or of_class or str(inner.__module__ or "").startswith(_HOOKS):
            continue
        return f"its forward is replaced by {_name_of(inner)}"
    return None


def _name_of(value: Any) -> str:
    found = getattr(value, "__qualname__", None) or type(value).__qualname__
    return f"{getattr(value, '__module__', None) or type(value).__module__}.{found}"


_PICTURE_MAPS = ("to_k_ip", "to_v_ip")
"""Maps of an attention processor that take no text but picture embeddings (IP-Adapter)."""


def _check_processor(name: str, processor: Any, width: int, own: set[int]) -> None:
    """Refuses an attention processor that holds a map of its own that text may meet.

    Args:
        width: features of the text.
        own: ids of the model's parameters, which a processor may refer to.
    """
    kind = type(processor)
    stock = kind.__module__.startswith("diffusers.")
    for key, tensor in _held(processor, "", set()):
        if stock and key.split(".")[0] in _PICTURE_MAPS:
            continue
        if tensor.dim() == 2 and width in tensor.shape and id(tensor) not in own:
            raise RefusedModelError(
                f"model: {name} runs the attention processor {kind.__name__}, which has weights of "
                f"its own ({key}): text may meet these in place of to_k and to_v, and they would "
                "not be erased. Set a stock processor before the call "
                "(model.set_attn_processor(AttnProcessor2_0()))",
                ", or merge its weights into the model",
            )


def _held(value: Any, name: str, seen: set[int]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor that an object holds, in attributes, containers, closures and modules."""
    if id(value) in seen or isinstance(value, type | ModuleType | str | bytes | int | float):
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield name, value
        return
    parts: dict[str, Any] = {}
    if isinstance(value, nn.Module):
        parts |= dict(value.named_parameters()) | dict(value.named_buffers())
    if isinstance(value, Mapping):
        parts |= {str(key): item for key, item in value.items()}
    elif isinstance(value, list | tuple | set | frozenset):
        parts |= {str(number): item for number, item in enumerate(value)}
    elif isinstance(value, functools.partial):
        parts |= {"func": value.func, "args": value.args, "keywords": value.keywords}
    elif isinstance(value, MethodType):
        parts |= {"self": value.__self__, "func": value.__func__}
    elif isinstance(value, FunctionType):
        cells = zip(value.__code__.co_freevars, value.__closure__ or (), strict=True)
        for variable, cell in cells:
            with suppress(ValueError):  # nothing was put into it yet
                parts[variable] = cell.cell_contents
        parts |= {"defaults": value.__defaults__, "keywords": value.__kwdefaults__}
    elif not isinstance(value, nn.Module):
        parts |= getattr(value, "__dict__", {})
        for kind in type(value).__mro__:
            slots = vars(kind).get("__slots__", ())
            for slot in (slots,) if isinstance(slots, str) else slots:
                with suppress(AttributeError):
                    parts[slot] = getattr(value, slot)
    for key, part in parts.items():
        yield from _held(part, f"{name}.{key}" if name else str(key), seen)


def _check_attention(name: str, module: nn.Module, own: set[int] | None) -> None:
    """Refuses a layer whose keys and values are not `to_k` and `to_v` of the text.

    Args:
        own: ids of the model's parameters; None leaves out how the layer is run.
    """
    # The processor decides: unfusing brings it back, but leaves `fused_projections` set.
    processor = getattr(module, "processor", None)
    fused = processor is None or type(processor).__name__.startswith("Fused")
    if fused and getattr(module, "fused_projections", False):
        raise ValueError(
            f"model: {name} runs fused projections, which ignore its to_k and to_v weights; call "
            "unfuse_qkv_projections() first, and fuse again afterwards"
        )
    key: Any = getattr(module, "to_k", None)
    if own is not None and processor is not None and isinstance(key, nn.Linear):
        _check_processor(name, processor, key.in_features, own)
    if getattr(module, "add_k_proj", None) is not None:
        raise ValueError(
            f"model: {name} takes its text through add_k_proj and add_v_proj "
            "(AttnAddedKVProcessor), which is not supported"
        )
    if getattr(module, "norm_cross", None) is not None:
        raise ValueError(
            f"model: {name} normalizes the text embeddings itself (cross_attention_norm), which is "
            "not supported"
        )


def _checked(name: str, layer: Any) -> nn.Linear:
    # PyTorch's own quantized layers have a method of that name.
    weight = getattr(layer, "weight", None)
    if weight is None:
        raise ValueError(
            f"model: {name} is a {type(layer).__name__}, not a linear layer: not supported"
        )
    weight = weight if isinstance(weight, Tensor) else None
    if weight is not None and weight.device.type == "meta":
        raise ValueError(
            f"model: {name}.weight is on the meta device (no values); load the weights first, "
            "without device_map or offloading"
        )
    # Quantizers replace the layer, the parameter's class (bitsandbytes), the tensor's class
    # (torchao) or only its dtype (float8 storage); a parametrization replaces the parameter.
    plain = (
        isinstance(layer, nn.Linear)
        and type(layer).forward is nn.Linear.forward
        and type(weight) is nn.Parameter
        and type(weight.data) is Tensor
        and weight.dtype in _DTYPES
        and weight.layout == torch.strided
    )
    if not plain:
        kind = f"{type(layer).__name__} with a weight of {type(weight).__name__}"
        dtype = f", {weight.dtype}" if isinstance(weight, Tensor) else ""
        raise ValueError(
            f"model: {name} is quantized or not a plain linear layer ({kind}{dtype}); load the "
            "model in float32, bfloat16 or float16 without quantization or adapters"
        )
    return layer


def check_width(model: nn.Module, stream: Stream, width: int, maps: Maps | None = None) -> None:
    """Raises ValueError unless the maps of a stream take text of that many features."""
    layers = projections(model, maps, as_run=False)
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


def weights_hash(weights: Mapping[str, Tensor], dtype: torch.dtype) -> str:
    """SHA-256 over names, shapes and values, as `dtype`, whatever the order and device.

    Args:
        weights: `[o, d]` matrix of each name.
        dtype: What the values are rounded to first.
    """
    digest = hashlib.sha256(f"realera_fast {dtype}".encode())
    for name in sorted(weights):
        weight = weights[name].detach().cpu().to(dtype).contiguous()
        digest.update(f"\n{name} {list(weight.shape)}\n".encode())
        digest.update(weight.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def base_hashes(model: nn.Module, maps: Maps | None = None) -> dict[str, str]:
    """Identifies the projection weights, also as they would be after loading in a narrower dtype.

    Returns:
        Dtype name ("float32" …) to SHA-256, for the stored dtype and each of fewer bytes. The
        same checkpoint loaded in float32 and in bfloat16 agrees on "bfloat16".
    """
    layers = projections(model, maps, as_run=False)
    weights = {name: layer.weight.detach().cpu() for name, layer in layers.items()}
    stored = next(iter(weights.values())).dtype
    return {
        str(dtype).removeprefix("torch."): weights_hash(weights, dtype)
        for dtype in _DTYPES
        if dtype == stored or dtype.itemsize < stored.itemsize
    }


class Structure:
    """What a model is built of and its flags, without values: children, adapters, gradients, modes.

    Restoring takes out whatever was injected since, by peft or anyone else, and brings back the
    very same modules. It holds references to the model: don't keep it longer than needed.
    """

    def __init__(self, model: nn.Module) -> None:
        self._unet = model
        self._children = [(module, dict(module._modules)) for module in model.modules()]
        self._training = [(module, module.training) for module in model.modules()]
        self._gradients = [(weight, weight.requires_grad) for weight in model.parameters()]
        self._peft = {k: v for k, v in vars(model).items() if k in _PEFT_ATTRIBUTES}

    def restore(self) -> None:
        """Brings everything back; doing it twice does no harm."""
        for module, children in self._children:
            if module._modules != children:
                module._modules.clear()
                module._modules.update(children)
        for key in _PEFT_ATTRIBUTES:
            if key in self._peft:
                vars(self._unet)[key] = self._peft[key]
            else:
                vars(self._unet).pop(key, None)
        for module, training in self._training:
            module.training = training
        for weight, requires_grad in self._gradients:
            # Setting what is set already is an error on tensors of inference mode.
            if weight.requires_grad != requires_grad:
                weight.requires_grad_(requires_grad)


_PEFT_ATTRIBUTES = ("peft_config", "_hf_peft_config_loaded")


@contextmanager
def transaction(model: nn.Module, layers: Mapping[str, nn.Linear] | None = None) -> Iterator[None]:
    """Any exception inside, Ctrl-C included, leaves the weights as they were, bit for bit.

    They stay the same ``Parameter`` objects in the same storage, so optimizers, views and compiled
    graphs of the caller stay valid. Adapters that were injected inside are taken out, and
    ``requires_grad`` and training mode come back too. On success nothing is done. Where putting
    back one layer fails, the others are put back all the same, and the exception gets a note that
    names the layer.

    Args:
        layers: those whose weights are guarded; None is all text projections.
    """
    layers = projections(model) if layers is None else layers
    structure = Structure(unwrapped(model))
    # Copies rest on the CPU: on a GPU, memory is what an erasure is short of.
    saved = [
        (name, layer, layer.weight, layer.weight.data, layer.weight.detach().to("cpu", copy=True))
        for name, layer in layers.items()
    ]

    def put_back(layer: Any, parameter: Any, former: Any, values: Any) -> None:
        layer.weight = parameter
        if parameter.data_ptr() != former.data_ptr() or parameter.dtype != former.dtype:
            parameter.data = former
        write_(parameter, values)

    def restore() -> dict[str, Exception]:
        steps: dict[str, Callable[[], None]] = {"its modules": structure.restore}
        for name, *guarded in saved:
            steps[name] = functools.partial(put_back, *guarded)
        failed = {}
        for name, step in steps.items():
            try:
                step()
            except Exception as error:
                failed[name] = error
        return failed

    try:
        yield
    except BaseException as cause:
        logger.info("restoring the weights")
        while True:
            try:
                failed = restore()
                break
            except KeyboardInterrupt:
                # Another Ctrl-C, while restoring: it takes milliseconds, so start again.
                continue
        for name, error in failed.items():
            cause.add_note(f"model: restoring {name} failed as well ({error}); reload the model")
        raise


def write_(weight: Tensor, values: Tensor) -> None:
    """Copies values into a weight, in place; also into one that was made in inference mode."""
    with torch.inference_mode(weight.is_inference()), torch.no_grad():
        weight.copy_(values)
