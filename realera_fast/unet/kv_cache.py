"""Keys and values once per prompt instead of once per denoising step."""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from realera_fast.runtime import exclusive, unwrapped
from realera_fast.unet import attention

_PROMPTS = 4
"""Prompts kept at a time, for pipelines that call the U-Net with several in a step."""

ModuleT = TypeVar("ModuleT")


class _Kept(NamedTuple):
    """A layer's keys and values of one prompt."""

    stamp: tuple[Any, ...]
    """Of the weights that they were computed with."""
    keys_values: tuple[Tensor, Tensor]


@dataclass(eq=False)
class _Prompt:
    """What is known of one tensor of text embeddings."""

    states: weakref.ref[Tensor]
    version: int
    layers: dict[str, _Kept] = field(default_factory=dict)
    """By layer name."""


class TextKVCache:
    """A projector that asks the layers themselves, once for each prompt and state of the weights.

    Prompts are told apart by the tensor they are in, and forgotten with it. A changed, moved or
    replaced weight is noticed. Where that can't be told (weights behind adapters or hooks, tensors
    made in inference mode), where gradients are wanted, under autocast and in `torch.compile`, the
    layers compute as always.
    """

    def __init__(self) -> None:
        self._prompts: list[_Prompt] = []
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]

    def __deepcopy__(self, memo: dict[int, Any]) -> TextKVCache:
        return TextKVCache()

    def keys_values(self, layer: str, attn: Any, states: Tensor) -> tuple[Tensor, Tensor]:
        """A layer's keys and values for text, remembered where that is safe."""
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or states.is_inference():
            return attn.to_k(states), attn.to_v(states)
        # What is recorded to be replayed must hold the projections themselves.
        if torch.jit.is_tracing() or (states.is_cuda and torch.cuda.is_current_stream_capturing()):
            return attn.to_k(states), attn.to_v(states)
        stamp = _stamp(attn.to_k, attn.to_v)
        if stamp is None or torch.is_autocast_enabled(states.device.type):
            return attn.to_k(states), attn.to_v(states)
        with self._lock:
            prompt = self._prompt(states)
            known = prompt.layers.get(layer)
        if known is not None and _is_same(known.stamp, stamp):
            return known.keys_values
        found = attn.to_k(states), attn.to_v(states)
        with self._lock:
            prompt.layers[layer] = _Kept(stamp, found)
        return found

    def _prompt(self, states: Tensor) -> _Prompt:
        # Newest first; what died or was written to since is dropped.
        living = [p for p in self._prompts if _is_as_it_was(p)]
        found = next((p for p in living if p.states() is states), None)
        if found is None:
            found = _Prompt(weakref.ref(states, self._drop), states._version)
        self._prompts = [found, *(p for p in living if p is not found)][:_PROMPTS]
        return found

    def _drop(self, dead: weakref.ref[Tensor]) -> None:
        # No lock: a finalizer may run while this thread holds it. A new list is one assignment.
        self._prompts = [p for p in self._prompts if p.states is not dead]

    def query(self, layer: str, attn: Any, hidden: Tensor) -> Tensor:
        """A layer's queries."""
        query: Tensor = attn.to_q(hidden)
        return query

    def output(self, layer: str, attn: Any, hidden: Tensor) -> Tensor:
        """A layer's output projection."""
        output: Tensor = attn.to_out[0](hidden)
        return output


def _is_as_it_was(prompt: _Prompt) -> bool:
    states = prompt.states()
    return states is not None and states._version == prompt.version


def _is_same(stamp: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    return len(stamp) == len(other) and all(map(_is_same_entry, stamp, other))


def _is_same_entry(one: Any, other: Any) -> bool:
    if isinstance(one, weakref.ref) and isinstance(other, weakref.ref):
        # Equality of references would ask tensors for theirs, which is a tensor.
        referent = one()
        return referent is not None and referent is other()
    return bool(one == other)


def _stamp(*layers: Any) -> tuple[Any, ...] | None:
    """Identifies the weights of plain layers as they are now; None where that can't be done."""
    found: list[Any] = []
    for layer in layers:
        if type(layer) is not nn.Linear or layer._forward_hooks or layer._forward_pre_hooks:
            return None
        if "forward" in vars(layer):
            return None
        for parameter in (layer.weight, layer.bias):
            if parameter is None:
                continue
            if parameter.is_inference():
                return None
            # Freed memory is handed out again at the same address: a dead reference never is.
            found += [weakref.ref(parameter), weakref.ref(parameter.untyped_storage())]
            found += [parameter.data_ptr(), parameter._version, parameter.dtype, parameter.device]
    return tuple(found)


@exclusive
def fuse(pipe: ModuleT) -> ModuleT:
    """Lets a model compute the keys and values of its text once per prompt.

    The images are the same, bit for bit where it ran diffusers' default attention. It keeps
    `2 b t m` values for each of the last prompts (b rows, t tokens, m features of all projections
    of keys, as many of values): 8 MB for one guided prompt of Stable Diffusion 1 in half precision.
    Weights may change in the meantime: erase, restore, load adapters as always. Only a write
    around PyTorch's version counter goes unnoticed while the same prompt tensor lives
    (`weight.data.add_(...)`, and so `fuse_lora`): `unfuse` and `fuse` again forget everything.

    Args:
        pipe: a diffusers pipeline with a `unet`, or the U-Net itself.

    Returns:
        The same `pipe`. Doing it twice does no harm.

    Raises:
        TypeError: it is neither.
        ValueError: it has no cross-attention, or one that is not diffusers' own.
    """
    unet = _unet(pipe)
    # Others may have set processors since.
    if not _ours(unet) or len(_ours(unet)) < len(attention.layers(unet)):
        unfuse(unet)
        setattr(unet, _FORMER, attention.install(unet, TextKVCache()))
    return pipe


@exclusive
def unfuse(pipe: ModuleT) -> ModuleT:
    """Undoes `fuse`: the former attention processors come back, the same objects.

    Args:
        pipe: as for `fuse`.

    Returns:
        The same `pipe`. Does no harm where nothing was fused.

    Raises:
        TypeError: it is neither a pipeline nor a U-Net.
    """
    unet = _unet(pipe)
    if hasattr(unet, _FORMER):
        former = getattr(unet, _FORMER)
        attention.reinstate(unet, {name: former[name] for name in _ours(unet)})
        delattr(unet, _FORMER)
    return pipe


_FORMER = "_realera_fast_processors"
"""Attribute of a fused model that holds the processors it had: they go with it, copies too."""


def _ours(unet: nn.Module) -> list[str]:
    """Names of the layers that run a prompt cache."""
    return [
        name
        for name, module in unet.named_modules()
        if isinstance(getattr(getattr(module, "processor", None), "projector", None), TextKVCache)
    ]


def _unet(pipe: Any) -> nn.Module:
    unet = getattr(pipe, "unet", pipe)
    if isinstance(unet, nn.Module):
        return unwrapped(unet)
    raise TypeError(
        f"pipe: expected a diffusers pipeline with a unet, or a U-Net, got {type(pipe).__name__}"
    )
