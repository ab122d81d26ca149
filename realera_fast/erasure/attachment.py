"""An erasure as an adapter around the layers of a living model, whose weights stay as they are.

It goes through the model's own `load_lora_adapter` (diffusers, peft), so that quantized layers run
as their libraries run them and other adapters can stand beside it.
"""

from __future__ import annotations

import json
import logging
import threading
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

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

_attached: WeakKeyDictionary[nn.Module, Erasure] = WeakKeyDictionary()
_lock = threading.Lock()


def attached_to(model: nn.Module) -> Erasure | None:
    """The erasure that is attached to a model object in this process, unless it was unloaded."""
    inner: Any = unwrapped(model)
    with _lock:
        found = _attached.get(inner)
    return found if ADAPTER in (getattr(inner, "peft_config", None) or {}) else None


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
            _settle(layer.lora_A[ADAPTER], down, devices[name], layer.training)
            _settle(layer.lora_B[ADAPTER], up, devices[name], layer.training)
        for weight, requires_grad in gradients:
            if weight.requires_grad != requires_grad:
                weight.requires_grad_(requires_grad)
        with _lock:
            _attached[inner] = erasure
    logger.info("attached %r to %d layers", erasure, len(changed))
    return model


def _settle(part: nn.Linear, values: torch.Tensor, device: torch.device, training: bool) -> None:
    """Puts one factor where its layer runs. Beside offloaded weights it was made without values."""
    if part.weight.is_meta:
        part.to_empty(device=device)
        with torch.no_grad():
            part.weight.copy_(values)
    part.to(device).requires_grad_(False).train(training)


def detached(erasure: Erasure, model: nn.Module) -> bool:
    """Takes the adapter of `attach_` out, where it is this erasure's; other adapters stay.

    Returns:
        Whether it was attached.

    Raises:
        ValueError: it was unloaded since.
    """
    inner: Any = unwrapped(model)
    with _lock:
        found = _attached.get(inner)
    if found is None or not is_same(found, erasure):
        return False
    if attached_to(model) is None:
        raise ValueError(
            f"model: the adapter {ADAPTER!r} of this erasure was unloaded since, so there is "
            "nothing to undo"
        )
    if set(inner.peft_config) == {ADAPTER}:
        inner.unload_lora()
    else:
        inner.delete_adapters(ADAPTER)
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
            return Weights({name: layer.get_base_layer() for name, layer in layers.items()})
    return None
