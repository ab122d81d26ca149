"""Weights that are read and never written: quantized, or offloaded while the layer does not run.

An erasure that is attached as an adapter needs values of the layers that text meets, and leaves the
layers alone. Each class of a quantizer is read by the function that its own library has for that;
one layer at a time, so that the model is never there twice.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

WEIGHT_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""Weights that can be edited, widest first."""

Target = Literal["weights", "adapter"]
"""What an erasure is written to: the weights themselves, or an adapter beside them."""

TARGETS: tuple[Target, ...] = ("weights", "adapter")

QUANTIZERS = ("bitsandbytes.", "optimum.quanto.")
"""Packages whose classes of linear layers are read here and run as they stand."""


class UnreadableWeightError(ValueError):
    """A layer whose values nothing here can read; the message is a clause that says why."""


def check_target(target: Any) -> None:
    """Raises ValueError unless `target` is one of `TARGETS`."""
    if target not in TARGETS:
        raise ValueError(f'target: expected "weights" or "adapter", got {target!r}')


def is_plain(layer: Any, weight: Tensor | None) -> bool:
    """Whether a layer is PyTorch's own with an ordinary weight, which an edit in place reaches.

    Quantizers replace the layer, the parameter's class (bitsandbytes), the tensor's class (torchao)
    or only its dtype (float8 storage); a parametrization replaces the parameter.
    """
    return (
        isinstance(layer, nn.Linear)
        and type(layer).forward is nn.Linear.forward
        and type(weight) is nn.Parameter
        and type(weight.data) is Tensor
        and weight.dtype in WEIGHT_DTYPES
        and weight.layout == torch.strided
    )


def dense_weight(layer: Any) -> Tensor:
    """`[o, d]` the weight that a linear layer multiplies with, without what quantizers pack it in.

    Args:
        layer: plain, or of torchao, optimum-quanto, bitsandbytes or GGUF; its weight may be
            offloaded by accelerate.

    Returns:
        On the device that the weight rests on, in a dtype of `WEIGHT_DTYPES`; of a plain layer the
        weight itself, detached.

    Raises:
        UnreadableWeightError: it is none of these, or has no values.
    """
    weight = _resting(layer)
    if is_plain(layer, weight):
        return weight.detach()
    try:
        with torch.no_grad():
            dense = _unpacked(layer, weight)
    except UnreadableWeightError:
        raise
    except Exception as error:
        # Such as a layer of bitsandbytes that was not moved to its device yet.
        raise UnreadableWeightError(
            f"{type(weight).__module__} can't unpack its {type(weight).__name__} "
            f"({type(error).__name__}: {error})"
        ) from error
    if dense.dtype not in WEIGHT_DTYPES:
        dense = dense.float()
    size = (layer.out_features, layer.in_features)
    if tuple(dense.shape) != size:
        raise UnreadableWeightError(f"it reads as {list(dense.shape)}, expected {list(size)}")
    return dense


def execution_device(layer: Any) -> torch.device:
    """Where a layer runs: where its weight is, or is brought to by accelerate."""
    for hook in _offloading(layer):
        return torch.device(hook.execution_device)
    device: torch.device = layer.weight.device
    return device


class Weights(Mapping[str, Tensor]):
    """`[o, d]` weights of layers by name, read anew whenever one is asked for."""

    def __init__(self, layers: Mapping[str, nn.Linear]) -> None:
        self._layers = layers

    def __getitem__(self, name: str) -> Tensor:
        return dense_weight(self._layers[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)


def _offloading(layer: Any) -> Iterator[Any]:
    """Hooks of accelerate that keep the weights of a layer elsewhere while it does not run."""
    hook = getattr(layer, "_hf_hook", None)
    for each in getattr(hook, "hooks", (hook,)):
        if getattr(each, "offload", False) and getattr(each, "weights_map", None) is not None:
            yield each


def _resting(layer: Any) -> Any:
    """The weight as it is stored, wherever that is."""
    for hook in _offloading(layer):
        kept = hook.weights_map["weight"]
        return kept if isinstance(kept, nn.Parameter) else nn.Parameter(kept, requires_grad=False)
    weight = getattr(layer, "weight", None)
    if isinstance(weight, Tensor) and weight.is_meta:
        raise UnreadableWeightError("it is on the meta device (no values)")
    return weight


def _unpacked(layer: Any, weight: Any) -> Tensor:
    """A packed weight, by the function of the library that packed it."""
    kind, package = type(weight).__name__, type(weight).__module__
    packed = getattr(layer, "qweight", None)
    if type(layer).__module__.startswith("optimum.quanto.") and packed is not None:
        dense: Tensor = packed.dequantize()
    elif package.startswith("torchao.") and isinstance(layer, nn.Linear):
        dense = weight.dequantize()
    elif kind == "Params4bit":
        functional: Any = importlib.import_module("bitsandbytes.functional")
        dense = functional.dequantize_4bit(weight.data, weight.quant_state)
    elif kind == "Int8Params":
        functional = importlib.import_module("bitsandbytes.functional")
        state = layer.state
        scale = weight.SCB if state.SCB is None else state.SCB
        dense = functional.int8_vectorwise_dequant(weight.data, scale)
    elif kind == "GGUFParameter":
        dense = importlib.import_module(package).dequantize_gguf_tensor(weight)
        dense = dense.to(getattr(layer, "compute_dtype", None) or dense.dtype)
    elif _is_made(layer, weight):
        dense = weight
    else:
        dtype = f", {weight.dtype}" if isinstance(weight, Tensor) else ""
        raise UnreadableWeightError(
            f"it is a {type(layer).__name__} with a weight of {type(weight).__name__}{dtype}"
        )
    return dense.detach().as_subclass(Tensor)


def _is_made(layer: Any, weight: Any) -> bool:
    """Whether an ordinary weight is made of others when it is asked for (a parametrization)."""
    ordinary = type(weight) is Tensor and weight.layout == torch.strided
    plain = isinstance(layer, nn.Linear) and type(layer).forward is nn.Linear.forward
    return ordinary and plain and weight.dtype in WEIGHT_DTYPES
