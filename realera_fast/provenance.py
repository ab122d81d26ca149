"""What an erasure was made of, and what it fits."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from realera_fast import ops
from realera_fast.config import EraseConfig
from realera_fast.erasure import history_of
from realera_fast.models import Family, Target, base_hashes, dense_weight, projections
from realera_fast.runtime import unwrapped


def provenance_of(
    model: Any, config: EraseConfig, family: Family, target: Target, preserve: Sequence[str]
) -> dict[str, Any]:
    """`Erasure.provenance`: versions, seed, and the base model with the hashes of its weights.

    Args:
        preserve: words that were named to stay.
        target: what the erasure is written to; "dtype" is that of the weights without what
            quantizers pack them in.
    """
    versions = {}
    for package in ("realera_fast", "torch", "diffusers", "transformers", "peft"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    layers = projections(model, family.maps, target=target)
    weight = dense_weight(next(iter(layers.values())))
    name = str(getattr(getattr(unwrapped(model), "config", None), "_name_or_path", ""))
    is_id = bool(re.fullmatch(r"[\w.-]+/[\w.-]+", name)) and not Path(name).exists()
    return {
        # A hub id; a path on this machine is nobody's business.
        "base_model": name if is_id else None,
        "versions": versions,
        "model_class": type(unwrapped(model)).__name__,
        "target": target,
        "dtype": str(weight.dtype).removeprefix("torch."),
        "device": weight.device.type,
        "base_hashes": base_hashes(model, family.maps),
        "reading": family.to_dict(),
        "history": history_of(model),
        "seed": config.seed,
        "preserve": list(preserve),
    }


def provenance_after(provenance: dict[str, Any]) -> dict[str, Any]:
    """The same when the run is over: with the kernels that plain PyTorch had to stand in for."""
    found = ops.distrusted()
    return {**provenance, "distrusted_kernels": found} if found else provenance
