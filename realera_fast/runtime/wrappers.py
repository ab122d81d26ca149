"""Models inside wrappers, and hooks that keep weights elsewhere."""

from __future__ import annotations

from torch import nn


def unwrapped(model: nn.Module) -> nn.Module:
    """The module itself where ``torch.compile`` or data parallelism wrapped it; else `model`."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and type(model).__name__ in ("DistributedDataParallel", "DataParallel"):
            inner = model.module
        if inner is None:
            return model
        model = inner


def refuse_offloading(
    model: nn.Module, argument: str, *, readable: bool = False, otherwise: str = ""
) -> None:
    """Refuses a model whose weights are elsewhere, or come and go.

    Args:
        argument: what the caller calls the model.
        readable: whether those are let pass that accelerate keeps where they can be read.
        otherwise: what else may be done about those, as the end of the sentence.

    Raises:
        ValueError: some are offloaded.
    """
    for name, module in model.named_modules():
        hook = getattr(module, "_hf_hook", None)
        offloads = any(getattr(h, "offload", False) for h in getattr(hook, "hooks", (hook,)))
        # diffusers keeps its own hooks, by name, in a registry on the module.
        registry = getattr(getattr(module, "_diffusers_hook", None), "hooks", {})
        if (offloads and not readable) or any("offload" in key for key in registry):
            raise ValueError(
                f"{argument}: the weights of {name or 'the model'} are offloaded, so that they "
                "can't be read and changed here; erase before enabling offloading, or reload the "
                "model without it" + (f", or {otherwise}" if offloads and otherwise else "")
            )
