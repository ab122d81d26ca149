"""What makes an edit of a model's text maps wrong, and why: each check raises."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import suppress
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from realera_fast.models.dense import (
    QUANTIZERS,
    UnreadableWeightError,
    dense_weight,
    is_plain,
)
from realera_fast.runtime import unwrapped


class RefusedModelError(ValueError):
    """A model that can't be edited, and what else may be done about it before `erase` alone."""

    def __init__(self, told: str, before_erasing: str) -> None:
        super().__init__(told)
        self.before_erasing = before_erasing
        """Goes on where the message ends."""


_HARMLESS: Mapping[str, tuple[Any, ...]] = {
    "encoder_hid_dim_type": (None, "ip_image_proj"),
    "addition_embed_type": (None, "text_time"),
    # Labels and numbers are no text; a vector may be one.
    "class_embed_type": (None, "timestep"),
    "attention_type": (None, "default"),
    "dual_cross_attention": (None, False),
}
"""Settings of a U-Net, and the values with which nothing but the text itself carries text."""


_WAYS = {
    "encoder_hid_dim_type": "encoder_hid_proj, before all attention, as in Kolors and DeepFloyd IF",
    "addition_embed_type": "add_embedding, beside the attention",
    "attention_type": "the position net of GLIGEN",
}
"""What such a way is called."""


def check_config(config: Any) -> None:
    """Refuses a configuration with a way in for text that the table does not know."""
    for name, allowed in _HARMLESS.items():
        value = getattr(config, name, None)
        if value not in allowed:
            where = f" ({_WAYS[name]})" if name in _WAYS else ""
            raise ValueError(
                f"model: its {name}={value!r} gives text another way in{where}, which is not "
                "supported"
            )


def check_alike(layers: Mapping[str, nn.Linear]) -> None:
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


def check_apart(model: nn.Module, layers: Mapping[str, nn.Linear]) -> None:
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


def check_way(model: nn.Module, name: str, *, known: bool) -> None:
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
        source = forward_class(module).__module__
        # The map itself may be of a quantizer: it is checked before whether that can be read.
        stock = ("diffusers.", "torch.nn.", *(QUANTIZERS if place == name else ()))
        if known and not source.startswith(stock):
            raise ValueError(
                f"model: {place} is a {type(module).__name__}, a class that is not of diffusers, "
                "so it is not known what text it shows its layers; undo that (a patch for speed?) "
                "before the call, and do it again afterwards"
            )


def forward_class(module: nn.Module) -> type:
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
        of_class = getattr(inner, "__func__", None) is forward_class(module).__dict__["forward"]
        if forward is None or of_class or str(inner.__module__ or "").startswith(_HOOKS):
            continue
        return f"its forward is replaced by {_name_of(inner)}"
    return None


def _name_of(value: Any) -> str:
    found = getattr(value, "__qualname__", None) or type(value).__qualname__
    return f"{getattr(value, '__module__', None) or type(value).__module__}.{found}"


_IMAGE_MAPS = ("to_k_ip", "to_v_ip")
"""Maps of an attention processor that take no text but image embeddings (IP-Adapter)."""


def _check_processor(name: str, processor: Any, width: int, own: set[int]) -> None:
    """Refuses an attention processor that holds a map of its own that text may meet.

    Args:
        width: features of the text.
        own: ids of the model's parameters, which a processor may refer to.
    """
    kind = type(processor)
    stock = kind.__module__.startswith("diffusers.")
    for key, tensor in _held(processor, "", set()):
        if stock and key.split(".")[0] in _IMAGE_MAPS:
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


def check_attention(name: str, module: nn.Module, own: set[int] | None) -> None:
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


def why_not_on(device: torch.device) -> str:
    """Why nothing can be erased on a device; empty where it can be tried."""
    if device.type == "mps":
        return (
            "MPS has no float64, in which the closed form is solved; erase on the CPU "
            '(`.to("cpu")`) and move the model afterwards'
        )
    return ""


def check_layer(name: str, layer: Any) -> nn.Linear:
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
    if weight is not None and (reason := why_not_on(weight.device)):
        raise ValueError(f"model: {name}.weight is on {weight.device}: {reason}")
    if not is_plain(layer, weight):
        kind = f"{type(layer).__name__} with a weight of {type(weight).__name__}"
        dtype = f", {weight.dtype}" if isinstance(weight, Tensor) else ""
        raise ValueError(
            f"model: {name} is quantized or not a plain linear layer ({kind}{dtype}); load the "
            "model in float32, bfloat16 or float16 without quantization or adapters"
            + (', or leave it as it is: target="adapter"' if _is_readable(layer) else "")
        )
    return layer


def _is_readable(layer: Any) -> bool:
    try:
        dense_weight(layer)
    except UnreadableWeightError:
        return False
    return True


def check_readable(name: str, layer: Any) -> nn.Linear:
    """Refuses a layer whose values an adapter can't be made of."""
    try:
        weight = dense_weight(layer)
    except UnreadableWeightError as error:
        raise ValueError(
            f"model: the weight of {name} can't be read: {error}; an adapter is made for plain "
            "linear layers, those of torchao, optimum-quanto, bitsandbytes and GGUF, and those "
            "that accelerate offloads: load the model as one of these"
        ) from error
    if reason := why_not_on(weight.device):
        raise ValueError(f"model: {name}.weight is on {weight.device}: {reason}")
    if not weight.isfinite().all():
        raise ValueError(f"model: {name}.weight holds NaN or infinity; reload the model")
    return layer


def check_places(model: nn.Module, layers: Mapping[str, nn.Linear]) -> None:
    """Refuses layers that stand in several places: an adapter would be around one of them."""
    names = {id(layer): name for name, layer in layers.items()}
    for place, module in model.named_modules(remove_duplicate=False):
        name = names.get(id(module), place)
        if name != place:
            raise ValueError(
                f"model: {name} and {place} are one layer, and an adapter would change one of the "
                "two; put copy.deepcopy(layer) in one of the places"
            )
