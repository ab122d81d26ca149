"""LoRA factors on the text projections, injected and taken out through peft.

The base may be bfloat16 or float16; the factors are float32 masters, so small optimiser steps are
not rounded away. peft is imported when an adapter is attached, not before.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from realera_fast.unet import Structure, projections, unwrapped

_ADAPTER = "realera_fast"


@dataclass(frozen=True, eq=False)
class LoraFactors:
    """A low-rank addition to one weight: ``W + up @ down``, scaling included."""

    down: Tensor
    """`[r, d]` float32."""
    up: Tensor
    """`[o, r]` float32."""

    def __post_init__(self) -> None:
        if self.down.dim() != 2 or self.up.dim() != 2 or self.up.shape[1] != self.down.shape[0]:
            raise ValueError(
                "down, up: expected shapes [r, d] and [o, r], "
                f"got {list(self.down.shape)} and {list(self.up.shape)}"
            )
        if self.down.dtype != torch.float32 or self.up.dtype != torch.float32:
            raise ValueError(
                f"down, up: expected float32, got {self.down.dtype} and {self.up.dtype}"
            )

    @property
    def rank(self) -> int:
        """Number r of rows of ``down``."""
        return self.down.shape[0]

    @property
    def delta(self) -> Tensor:
        """`[o, d]` float32 the dense addition."""
        return self.up @ self.down


@dataclass(frozen=True)
class _Attached:
    structure: Structure
    layers: dict[str, Any]
    """Name to peft's wrapper around the original linear layer."""


# The values refer to the model, so entries don't go by themselves: detach drops them.
_attached: WeakKeyDictionary[nn.Module, _Attached] = WeakKeyDictionary()


def attach(
    unet: nn.Module, names: Sequence[str], rank: int, *, alpha: float | None = None, seed: int
) -> list[nn.Parameter]:
    """Injects trainable float32 LoRA factors through peft and freezes everything else.

    The factors start as peft's do (``down`` uniform in +-1/sqrt(d), ``up`` zero), so the model's
    output does not change, but from a generator of their own: the global random state is untouched
    and equal seeds give equal factors on every device.

    Args:
        unet: The model, without adapters.
        names: Projections to adapt, as :func:`realera_fast.unet.projections` names them.
        rank: LoRA rank r.
        alpha: peft's ``lora_alpha``, the factors are scaled by ``alpha / rank``; default `rank`.
        seed: Seed of the initial ``down``.

    Returns:
        The trainable parameters, in the order of `names`.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ImportError(
            "noise alignment needs peft: pip install peft, or switch the stage off"
        ) from error
    model = unwrapped(unet)
    if rank < 1:
        raise ValueError(f"rank: expected at least 1, got {rank}")
    alpha = float(rank) if alpha is None else alpha
    if not (math.isfinite(alpha) and alpha > 0):
        raise ValueError(f"alpha: expected a positive finite number, got {alpha}")
    layers = projections(unet)
    unknown = [name for name in names if name not in layers]
    if unknown or not names or len(set(names)) != len(names):
        raise ValueError(
            "names: expected some of the model's text projections, each once, "
            f"got {unknown or list(names)}"
        )
    structure = Structure(model)
    # peft says int, and divides: a fraction is as good.
    scaled: Any = alpha
    config = LoraConfig(
        r=rank, lora_alpha=scaled, target_modules=list(names), lora_dropout=0.0, bias="none"
    )
    try:
        # peft draws its own initial factors from the global generator before ours replace them.
        with torch.random.fork_rng(devices=[]):
            inject_adapter_in_model(config, model, adapter_name=_ADAPTER)
        wrappers = {n: m for n, m in model.named_modules() if hasattr(m, "lora_A")}
        # peft matches names by their end too.
        assert set(wrappers) == set(names), f"peft adapted {sorted(wrappers)}"
        generator = torch.Generator().manual_seed(seed)
        parameters: list[nn.Parameter] = []
        for name in names:
            wrapper = wrappers[name]
            down = wrapper.lora_A[_ADAPTER].to(torch.float32).weight
            up = wrapper.lora_B[_ADAPTER].to(torch.float32).weight
            bound = 1 / math.sqrt(down.shape[1])
            noise = torch.rand(down.shape, generator=generator) * (2 * bound) - bound
            with torch.no_grad():
                down.copy_(noise)
                up.zero_()
            parameters += [down, up]
        _attached[model] = _Attached(structure, {name: wrappers[name] for name in names})
    except BaseException:
        _attached.pop(model, None)
        structure.restore()
        raise
    return parameters


def _layers(unet: nn.Module) -> dict[str, Any]:
    model = unwrapped(unet)
    attached = _attached.get(model)
    # A transaction that was rolled back takes adapters out without asking here.
    if attached is None or _ADAPTER not in (getattr(model, "peft_config", None) or {}):
        raise ValueError("unet: no adapter is attached; call attach first")
    return attached.layers


def extract(unet: nn.Module) -> dict[str, LoraFactors]:
    """The attached factors as they are now, on the CPU, with the scaling folded into ``up``."""
    return {
        name: LoraFactors(
            down=layer.lora_A[_ADAPTER].weight.detach().to("cpu", torch.float32, copy=True),
            up=layer.lora_B[_ADAPTER].weight.detach().cpu().float() * layer.scaling[_ADAPTER],
        )
        for name, layer in _layers(unet).items()
    }


def detach(unet: nn.Module) -> None:
    """Takes the factors out: the same ``nn.Linear`` objects, flags and modes as before `attach`.

    Does nothing where none are attached, so that it fits a ``finally``.
    """
    attached = _attached.pop(unwrapped(unet), None)
    if attached is not None:
        attached.structure.restore()


@contextmanager
def disabled(unet: nn.Module) -> Iterator[None]:
    """Runs the base alone inside: the teacher's pass needs no second copy of the model."""
    layers = list(_layers(unet).values())
    before = [
        (layer, layer.disable_adapters, [(p, p.requires_grad) for p in layer.parameters()])
        for layer in layers
    ]
    try:
        for layer in layers:
            layer.enable_adapters(False)
        yield
    finally:
        for layer, was_disabled, gradients in before:
            layer.enable_adapters(not was_disabled)
            # peft switches gradients together with adapters.
            for parameter, requires_grad in gradients:
                parameter.requires_grad_(requires_grad)
