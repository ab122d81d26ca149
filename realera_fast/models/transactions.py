"""A model is edited whole or not at all."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from realera_fast.models.entrances import projections
from realera_fast.runtime import unwrapped

logger = logging.getLogger(__name__)


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
