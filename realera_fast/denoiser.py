"""The weights that text enters a denoiser through: find them, identify them, guard them.

One rule finds them in every architecture: *the first linear maps that the text encoders' output
meets*. What comes after them then sees edited text, whatever it is, and nothing else has to change.

=========================  ==========================================  ==================
architecture               maps of the token sequence                  of the pooled vector
=========================  ==========================================  ==================
U-Net (SD 1, 2)            ``to_k``, ``to_v`` of each cross-attention  none
U-Net (SDXL, refiner)      the same                                    ``add_embedding.linear_1``
SD3, FLUX                  ``context_embedder``                        ``text_embedder.linear_1``
AuraFlow, Chroma, others   ``context_embedder``                        none
PixArt, Sana               ``caption_projection.linear_1``             none
=========================  ==========================================  ==================

Models are duck-typed: nothing here imports diffusers, accelerate or peft, but their ways to make a
weight that looks editable and isn't (fused projections, adapters, offloading, quantization) are
known and refused with a message that says what to do.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, Literal

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)

Stream = Literal["sequence", "pooled"]
"""How text enters: as a sequence of token embeddings, or as one vector a prompt."""

STREAMS: tuple[Stream, ...] = ("sequence", "pooled")

_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""Weights that can be edited, widest first."""

_TEXT = re.compile(r"encoder_hidden_states|text_embed|prompt|pooled|caption|context")
"""Arguments of a denoiser that carry text."""
_MASK = re.compile(r"mask$")


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
    """Which text a layer of that module name takes; None if it takes none."""
    if name.endswith((".to_k", ".to_v", "context_embedder", "caption_projection.linear_1")):
        return "sequence"
    if name.endswith(("text_embedder.linear_1", "add_embedding.linear_1")):
        return "pooled"
    return None


def streams(model: nn.Module) -> dict[str, Stream]:
    """Which text each text-conditioned linear map of a denoiser takes, by module name.

    Only the structure counts: the weights may be on the meta device. The text's features are the
    first columns of a weight; where there are more (SDXL's ``add_embedding``), they are not text.

    Args:
        model: a diffusers U-Net or transformer.

    Raises:
        TypeError: `model` is not a module.
        ValueError: text enters nowhere, or through something else than linear maps.
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
    config = getattr(model, "config", None)
    hidden = getattr(config, "encoder_hid_dim_type", None)
    if hidden not in (None, "ip_image_proj"):
        raise ValueError(
            f"model: it transforms the text embeddings first (encoder_hid_dim_type={hidden!r}), "
            "which is not supported"
        )
    added = getattr(config, "addition_embed_type", None)
    if added not in (None, "text_time"):
        raise ValueError(
            f"model: it adds an embedding of addition_embed_type={added!r}, which is not supported"
        )
    names: list[str] = []
    if getattr(model, "context_embedder", None) is not None:
        names = ["context_embedder"]
    elif getattr(model, "caption_projection", None) is not None:
        names = ["caption_projection.linear_1"]
    else:
        for name, module in model.named_modules():
            if getattr(module, "is_cross_attention", False):
                names += [f"{name}.to_k", f"{name}.to_v"]
    if not names:
        raise ValueError(
            f"model: {type(model).__name__} has no cross-attention layer, context_embedder or "
            "caption_projection, so text does not enter it in a way that is known here; expected "
            "a U-Net of Stable Diffusion or a transformer such as SD3, FLUX, PixArt or Sana"
        )
    if added == "text_time":
        names.append("add_embedding.linear_1")
    elif getattr(getattr(model, "time_text_embed", None), "text_embedder", None) is not None:
        names.append("time_text_embed.text_embedder.linear_1")
    found = {name: kind for name in names if (kind := stream_of(name)) is not None}
    _check_arguments(model, set(found.values()))
    return found


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


def _check_arguments(model: nn.Module, known: set[Stream]) -> None:
    """Refuses a denoiser with a way in for text that the rule doesn't know."""
    allowed = {"encoder_hidden_states"} | ({"pooled_projections"} if "pooled" in known else set())
    other = [
        name
        for name in inspect.signature(type(model).forward).parameters
        if _TEXT.search(name) and not _MASK.search(name) and name not in allowed
    ]
    if other:
        raise ValueError(
            f"model: {type(model).__name__} takes text through {', '.join(other)} as well, which "
            "is not supported"
        )


def projections(model: nn.Module) -> dict[str, nn.Linear]:
    """The text-conditioned linear maps of a denoiser, checked to be editable in place.

    Args:
        model: a diffusers U-Net or transformer.

    Returns:
        Module name to ``nn.Linear``, those of the token sequence first, in the order of the module
        tree; see `streams`. All share dtype and device, and those of the sequence their width.

    Raises:
        TypeError: `model` is not a module, or is a whole pipeline.
        ValueError: text enters nowhere, or weights that an edit would not (or not correctly) reach.
    """
    kinds = streams(model)
    model = unwrapped(model)
    refuse_adapters(model)
    refuse_offloading(model, "model")
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
            _check_attention(parent, owner)
        found[name] = _checked(name, getattr(owner, leaf, None))
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
    _check_alike(projections(model) | found)
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


def _check_attention(name: str, module: nn.Module) -> None:
    # The processor decides: unfusing brings it back, but leaves `fused_projections` set.
    processor = getattr(module, "processor", None)
    fused = processor is None or type(processor).__name__.startswith("Fused")
    if fused and getattr(module, "fused_projections", False):
        raise ValueError(
            f"model: {name} runs fused projections, which ignore its to_k and to_v weights; call "
            "unfuse_qkv_projections() first, and fuse again after the erasure"
        )
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
        and type(weight) is nn.Parameter
        and type(weight.data) is Tensor
        and weight.dtype in _DTYPES
        and weight.layout == torch.strided
    )
    if not plain:
        kind = f"{type(layer).__name__} with a weight of {type(weight).__name__}"
        dtype = "" if weight is None else f", {weight.dtype}"
        raise ValueError(
            f"model: {name} is quantized or not a plain linear layer ({kind}{dtype}); load the "
            "model in float32, bfloat16 or float16 without quantization"
        )
    return layer


def check_width(model: nn.Module, stream: Stream, width: int) -> None:
    """Raises ValueError unless the maps of a stream take text of that many features."""
    layers = projections(model)
    takes = {n: layers[n].in_features for n, kind in streams(model).items() if kind == stream}
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


def base_hashes(model: nn.Module) -> dict[str, str]:
    """Identifies the projection weights, also as they would be after loading in a narrower dtype.

    Returns:
        Dtype name ("float32" …) to SHA-256, for the stored dtype and each of fewer bytes. The
        same checkpoint loaded in float32 and in bfloat16 agrees on "bfloat16".
    """
    weights = {name: layer.weight.detach().cpu() for name, layer in projections(model).items()}
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
