"""An erasure as an adapter around the layers of a living model, whose weights stay as they are.

It goes through the model's own `load_lora_adapter` (diffusers, peft), so that quantized layers run
as their libraries run them and other adapters can stand beside it.
"""

from __future__ import annotations

import json
import logging
import threading
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from realera_fast.erasure.adapters import adapter_factors, in_layout
from realera_fast.erasure.base_model import check_base, layers_of
from realera_fast.erasure.edit import edit_of, is_same
from realera_fast.models import Weights, execution_device, projections, streams, transaction
from realera_fast.runtime import unwrapped

if TYPE_CHECKING:
    from realera_fast.erasure.erasure import Erasure

logger = logging.getLogger(__name__)

ADAPTER = "erasure"
"""What the adapter is called in the model: the name for `pipe.set_adapters`."""


@dataclass(frozen=True)
class _Attachment:
    """An erasure, and by what it is known that the adapter of its name is its own."""

    erasure: Erasure
    layer: str
    factor: weakref.ref[nn.Module]


_attached: weakref.WeakKeyDictionary[nn.Module, _Attachment] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def attached_to(model: nn.Module) -> Erasure | None:
    """The erasure that is attached to a model object in this process, unless it was unloaded."""
    inner: Any = unwrapped(model)
    with _lock:
        found = _attached.get(inner)
    if found is None:
        return None
    factors = getattr(inner.get_submodule(found.layer), "lora_A", {})
    own = factors[ADAPTER] if ADAPTER in factors else None
    if own is not None and own is found.factor():
        return found.erasure
    # It was unloaded, whatever has its name now.
    with _lock:
        _attached.pop(inner, None)
    return None


def check_alone(model: nn.Module) -> None:
    """Refuses an attached erasure that others stand beside, or that does not act.

    Raises:
        ValueError: says what to do.
    """
    inner: Any = unwrapped(model)
    others = [name for name in inner.peft_config if name != ADAPTER]
    if others:
        raise ValueError(
            f"pipe: other adapters ({', '.join(others)}) stand beside the erasure, and pictures "
            "would be of both; verify without them: pipe.delete_adapters(...)"
        )
    layers = [m for m in inner.modules() if ADAPTER in getattr(m, "lora_A", {})]
    _refuse_fused(layers)
    if any(m.disable_adapters or ADAPTER not in m.active_adapters for m in layers):
        raise ValueError(
            f"pipe: the adapter {ADAPTER!r} is switched off; call pipe.enable_lora() and "
            f"pipe.set_adapters([{ADAPTER!r}]) first"
        )


def _refuse_fused(layers: Iterable[Any]) -> None:
    """Raises ValueError where adapters are fused into the weights."""
    if any(getattr(layer, "merged", False) for layer in layers):
        raise ValueError(
            "model: its adapters are fused into the weights, which are not those of before; call "
            "pipe.unfuse_lora() first"
        )


def check_attachable(model: nn.Module) -> None:
    """Refuses a model that diffusers loads no adapters into.

    Raises:
        ValueError: says what to do.
    """
    inner = unwrapped(model)
    if not hasattr(inner, "load_lora_adapter"):
        raise ValueError(
            f'target: "adapter" needs a model that diffusers loads adapters into, and a '
            f'{type(inner).__name__} is none; use target="weights" on a model in float32, '
            "bfloat16 or float16"
        )
    for name, module in inner.named_modules():
        if "layerwise_casting" in getattr(getattr(module, "_diffusers_hook", None), "hooks", {}):
            raise ValueError(
                f"model: {name} has another dtype while it runs (layerwise casting), which an "
                "adapter around it has not; load the model without enable_layerwise_casting"
            )


def attach_(erasure: Erasure, model: nn.Module) -> nn.Module:
    """Attaches an erasure as an adapter, as `Erasure.apply_`."""
    edit = edit_of(erasure)
    inner: Any = unwrapped(model)
    check_attachable(model)
    projections(model, edit.takes, target="adapter")
    layers = layers_of(model, edit, "adapter")
    check_base(model, erasure.provenance.get("base_hashes"), edit.takes)
    changed = {name: layer for name, layer in layers.items() if edit.changes(name)}
    if not changed:
        return model
    factors = adapter_factors(edit, Weights(changed))
    devices = {name: execution_device(layer) for name, layer in changed.items()}
    tensors, metadata = in_layout(factors, "diffusers", "model", None)
    gradients = [(weight, weight.requires_grad) for weight in inner.parameters()]
    with transaction(model, {}):
        try:
            inner.load_lora_adapter(
                tensors,
                prefix="model",
                adapter_name=ADAPTER,
                metadata=json.loads(metadata["lora_adapter_metadata"]),
            )
        except Exception as error:
            kinds = {f"{type(x).__name__} ({type(x.weight).__name__})" for x in changed.values()}
            raise ValueError(
                f"model: peft can't attach an adapter to {next(iter(changed))} and others "
                f"({', '.join(sorted(kinds))}): {error}; quantize these layers in another way, "
                "or leave them out of the quantization"
            ) from error
        for name, (up, down) in factors.items():
            layer: Any = inner.get_submodule(name)
            layer.train(changed[name].training)
            _settle(layer.lora_A[ADAPTER], down, devices[name])
            _settle(layer.lora_B[ADAPTER], up, devices[name])
        for weight, requires_grad in gradients:
            if weight.requires_grad != requires_grad:
                weight.requires_grad_(requires_grad)
        first = next(iter(factors))
        factor = weakref.ref(inner.get_submodule(first).lora_A[ADAPTER])
        with _lock:
            _attached[inner] = _Attachment(erasure, first, factor)
    logger.info("attached %r to %d layers", erasure, len(changed))
    return model


def _settle(part: nn.Linear, values: torch.Tensor, device: torch.device) -> None:
    """Puts one factor where its layer runs. Beside offloaded weights it was made without values."""
    if part.weight.is_meta:
        part.to_empty(device=device)
        with torch.no_grad():
            part.weight.copy_(values)
    part.to(device).requires_grad_(False)


def detached(erasure: Erasure, model: nn.Module) -> bool:
    """Takes the adapter of `attach_` out, where it is this erasure's; other adapters stay.

    Returns:
        Whether it was attached.

    Raises:
        ValueError: it is fused into the weights.
    """
    inner: Any = unwrapped(model)
    found = attached_to(model)
    if found is None or not is_same(found, erasure):
        return False
    layers = [m for m in inner.modules() if hasattr(m, "lora_A") and hasattr(m, "active_adapters")]
    _refuse_fused(layers)
    active = {layer: [n for n in layer.active_adapters if n != ADAPTER] for layer in layers}
    gradients = [(weight, weight.requires_grad) for weight in inner.parameters()]
    if set(inner.peft_config) == {ADAPTER}:
        inner.unload_lora()
    else:
        inner.delete_adapters(ADAPTER)
        # Where the erasure alone was active peft would switch another one on.
        for layer, names in active.items():
            layer.set_adapter(names)
        for weight, requires_grad in gradients:
            weight.requires_grad_(requires_grad)
    with _lock:
        _attached.pop(inner, None)
    return True


def weights_beneath(erasure: Erasure, model: nn.Module | None) -> Weights | None:
    """Weights of the layers that an erasure is attached to, by name; None where it is not attached.

    Args:
        model: the one to look at; None is every living one.
    """
    edit = edit_of(erasure)
    with _lock:
        living = list(_attached) if model is None else [unwrapped(model)]
    for inner in living:
        found = attached_to(inner)
        if found is not None and is_same(found, erasure):
            names = [n for n in {**streams(inner, edit.takes), **edit.lora} if edit.changes(n)]
            layers: dict[str, Any] = {name: inner.get_submodule(name) for name in names}
            _refuse_fused(layers.values())
            return Weights({name: layer.get_base_layer() for name, layer in layers.items()})
    return None
