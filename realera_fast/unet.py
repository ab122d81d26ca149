"""The weights that text enters a denoiser through: find them, identify them, guard them.

In a Stable Diffusion U-Net these are ``to_k`` and ``to_v`` of every cross-attention layer. Models
are duck-typed: nothing here imports diffusers, accelerate or peft, but their ways to make a weight
that looks editable and isn't (fused projections, adapters, offloading, quantization) are known and
refused with a message that says what to do.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)

_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""Weights that can be edited, widest first."""


def unwrapped(unet: nn.Module) -> nn.Module:
    """The module itself where ``torch.compile`` wrapped it; else `unet`."""
    return getattr(unet, "_orig_mod", unet)


def projections(unet: nn.Module) -> dict[str, nn.Linear]:
    """The text-conditioned linear maps of a denoiser, checked to be editable in place.

    Args:
        unet: A ``UNet2DConditionModel``, or any module built from diffusers' ``Attention``.

    Returns:
        Module name to ``nn.Linear`` in the order of the module tree: ``to_k`` and ``to_v`` of each
        attention layer whose ``cross_attention_dim`` is set. All share dtype, device and width.

    Raises:
        TypeError: `unet` is not a module, or is a whole pipeline.
        ValueError: no cross-attention, or weights that an edit would not (or not correctly) reach.
    """
    if not isinstance(unet, nn.Module):
        hint = "; pass pipe.unet" if isinstance(getattr(unet, "unet", None), nn.Module) else ""
        raise TypeError(f"unet: expected a torch.nn.Module, got {type(unet).__name__}{hint}")
    unet = unwrapped(unet)
    _refuse_adapters(unet)
    _refuse_offloading(unet)
    hidden = getattr(getattr(unet, "config", None), "encoder_hid_dim_type", None)
    if hidden not in (None, "ip_image_proj"):
        raise ValueError(
            f"unet: it transforms the text embeddings first (encoder_hid_dim_type={hidden!r}), "
            "which is not supported"
        )
    found: dict[str, nn.Linear] = {}
    for name, module in unet.named_modules():
        if not getattr(module, "is_cross_attention", False):
            continue
        _check_attention(name, module)
        for leaf in ("to_k", "to_v"):
            found[f"{name}.{leaf}"] = _checked(f"{name}.{leaf}", getattr(module, leaf, None))
    if not found:
        raise ValueError(
            f"unet: {type(unet).__name__} has no cross-attention layer, so text does not enter it; "
            "expected a text-conditioned model such as UNet2DConditionModel"
        )
    widths = {layer.in_features: name for name, layer in found.items()}
    if len(widths) > 1:
        listed = ", ".join(f"{width} ({name})" for width, name in widths.items())
        raise ValueError(f"unet: its text projections must share one text width, got {listed}")
    _check_alike(found)
    return found


def queries_and_outputs(unet: nn.Module) -> dict[str, nn.Linear]:
    """``to_q`` and ``to_out.0`` of each cross-attention layer, which never see the text itself.

    No closed form reaches them; adapters may. Checked like `projections`, which `unet` must pass.

    Raises:
        ValueError: a layer that an edit would not (or not correctly) reach.
    """
    found: dict[str, nn.Linear] = {}
    for name, module in unwrapped(unet).named_modules():
        if getattr(module, "is_cross_attention", False):
            found[f"{name}.to_q"] = _checked(f"{name}.to_q", module.to_q)
            output = module.to_out[0] if module.to_out is not None else None
            found[f"{name}.to_out.0"] = _checked(f"{name}.to_out.0", output)
    _check_alike(projections(unet) | found)
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
                f"unet: its text projections must share one {what}, got {listed}; call "
                "unet.to(...) first"
            )
    # One reduction for all layers: a check of each in turn would wait for the GPU each time.
    finite = torch.stack([layer.weight.detach().isfinite().all() for layer in layers.values()])
    if not finite.all():
        bad = [name for name, ok in zip(layers, finite.tolist(), strict=True) if not ok]
        raise ValueError(
            f"unet: {bad[0]}.weight holds NaN or infinity"
            + (f" (and {len(bad) - 1} more projections)" if len(bad) > 1 else "")
            + "; reload the model"
        )


def _refuse_adapters(unet: nn.Module) -> None:
    advice = "merge it (pipe.fuse_lora()) and unload it (pipe.unload_lora_weights()) first"
    attached: Any = getattr(unet, "peft_config", None)
    if attached:
        names = ", ".join(map(repr, attached))
        raise ValueError(f"unet: an adapter is attached ({names}); {advice}")
    for name, module in unet.named_modules():
        if hasattr(module, "base_layer"):
            raise ValueError(f"unet: an adapter wraps {name}; {advice}")


def _refuse_offloading(unet: nn.Module) -> None:
    for name, module in unet.named_modules():
        hook = getattr(module, "_hf_hook", None)
        offloads = any(getattr(h, "offload", False) for h in getattr(hook, "hooks", (hook,)))
        # diffusers keeps its own hooks, by name, in a registry on the module.
        registry = getattr(getattr(module, "_diffusers_hook", None), "hooks", {})
        if offloads or any("offload" in key for key in registry):
            raise ValueError(
                f"unet: the weights of {name or 'the model'} are offloaded, so an edit would not "
                "last; erase before enabling offloading, or reload the model without it"
            )


def _check_attention(name: str, module: nn.Module) -> None:
    # The processor decides: unfusing brings it back, but leaves `fused_projections` set.
    processor = getattr(module, "processor", None)
    fused = processor is None or type(processor).__name__.startswith("Fused")
    if fused and getattr(module, "fused_projections", False):
        raise ValueError(
            f"unet: {name} runs fused projections, which ignore its to_k and to_v weights; call "
            "unfuse_qkv_projections() first, and fuse again after the erasure"
        )
    if getattr(module, "add_k_proj", None) is not None:
        raise ValueError(
            f"unet: {name} takes its text through add_k_proj and add_v_proj "
            "(AttnAddedKVProcessor), which is not supported"
        )
    if getattr(module, "norm_cross", None) is not None:
        raise ValueError(
            f"unet: {name} normalizes the text embeddings itself (cross_attention_norm), which is "
            "not supported"
        )


def _checked(name: str, layer: Any) -> nn.Linear:
    weight = getattr(layer, "weight", None)
    if weight is not None and weight.device.type == "meta":
        raise ValueError(
            f"unet: {name}.weight is on the meta device (no values); load the weights first, "
            "without device_map or offloading"
        )
    # Quantizers replace the layer, the parameter's class (bitsandbytes), the tensor's class
    # (torchao) or only its dtype (float8 storage); a parametrization replaces the parameter.
    plain = (
        isinstance(layer, nn.Linear)
        and type(weight) is nn.Parameter
        and type(weight.data) is Tensor
        and weight.dtype in _DTYPES
    )
    if not plain:
        kind = f"{type(layer).__name__} with a weight of {type(weight).__name__}"
        dtype = "" if weight is None else f", {weight.dtype}"
        raise ValueError(
            f"unet: {name} is quantized or not a plain linear layer ({kind}{dtype}); load the "
            "model in float32, bfloat16 or float16 without quantization"
        )
    return layer


def text_width(unet: nn.Module) -> int:
    """Features d of the text embeddings that `unet` takes."""
    return next(iter(projections(unet).values())).in_features


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


def base_hashes(unet: nn.Module) -> dict[str, str]:
    """Identifies the projection weights, also as they would be after loading in a narrower dtype.

    Returns:
        Dtype name ("float32" …) to SHA-256, for the stored dtype and each of fewer bytes. The
        same checkpoint loaded in float32 and in bfloat16 agrees on "bfloat16".
    """
    weights = {name: layer.weight.detach().cpu() for name, layer in projections(unet).items()}
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

    def __init__(self, unet: nn.Module) -> None:
        self._unet = unet
        self._children = [(module, dict(module._modules)) for module in unet.modules()]
        self._training = [(module, module.training) for module in unet.modules()]
        self._gradients = [(weight, weight.requires_grad) for weight in unet.parameters()]
        self._peft = {k: v for k, v in vars(unet).items() if k in _PEFT_ATTRIBUTES}

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
            weight.requires_grad_(requires_grad)


_PEFT_ATTRIBUTES = ("peft_config", "_hf_peft_config_loaded")


@contextmanager
def transaction(unet: nn.Module, layers: Mapping[str, nn.Linear] | None = None) -> Iterator[None]:
    """Any exception inside, Ctrl-C included, leaves the weights as they were, bit for bit.

    They stay the same ``Parameter`` objects in the same storage, so optimizers, views and compiled
    graphs of the caller stay valid. Adapters that were injected inside are taken out, and
    ``requires_grad`` and training mode come back too. On success nothing is done.

    Args:
        layers: those whose weights are guarded; None is all text projections.
    """
    layers = projections(unet) if layers is None else layers
    structure = Structure(unwrapped(unet))
    # Copies rest on the CPU: on a GPU, memory is what an erasure is short of.
    saved = [
        (layer, layer.weight, layer.weight.data, layer.weight.detach().to("cpu", copy=True))
        for layer in layers.values()
    ]

    def restore() -> None:
        structure.restore()
        with torch.no_grad():
            for layer, parameter, storage, values in saved:
                layer.weight = parameter
                if parameter.data_ptr() != storage.data_ptr() or parameter.dtype != storage.dtype:
                    parameter.data = storage
                parameter.copy_(values)

    try:
        yield
    except BaseException:
        logger.info("restoring the weights")
        while True:
            try:
                restore()
                break
            except KeyboardInterrupt:
                # Another Ctrl-C, while restoring: it takes milliseconds, so start again.
                continue
        raise
