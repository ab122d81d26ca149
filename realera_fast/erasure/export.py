"""An erasure in the forms that other programs read: adapters, edited tensors, whole models.

Each is called by the verb of `Erasure` that has its name, alone on its model.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from realera_fast.erasure.adapters import Layout, adapter_factors, in_layout
from realera_fast.erasure.attachment import weights_beneath
from realera_fast.erasure.base_model import BaseModelMismatchError, check_base, layers_of
from realera_fast.erasure.edit import edit_of
from realera_fast.erasure.history import (
    applications_of,
    histories,
    history_lock,
    is_last,
    is_same,
)
from realera_fast.erasure.model_card import Use, write_card
from realera_fast.erasure.single_file import find_weights
from realera_fast.models import ENTRANCES, Weights
from realera_fast.runtime import folder_atomically, patch, unwrapped, write

if TYPE_CHECKING:
    from realera_fast.erasure.erasure import Erasure

LORA_FILE = "pytorch_lora_weights.safetensors"
"""Where ``load_lora_weights`` looks in a folder."""


def save_lora(erasure: Erasure, path: Path, model: nn.Module | None, layout: Layout) -> Path:
    """Writes an adapter, as `Erasure.save_lora`."""
    edit = edit_of(erasure)
    if not edit.lora and not any(concept_map.rank for concept_map in edit.maps.values()):
        raise ValueError("this erasure changes nothing, so there is no adapter to save")
    file = path if path.suffix == ".safetensors" else path / LORA_FILE
    kind = erasure.provenance.get("model_class")
    component = component_of(erasure.provenance)
    if component == "controlnet":
        raise ValueError(
            f"{kind}: no pipeline loads adapters into a ControlNet; use save (factors), "
            "save_weights (edited tensors) or save_pretrained (the whole model)"
        )
    if not _loads_adapters(kind, model):
        raise ValueError(
            f"{kind}: diffusers loads no adapters for it; use save (factors), save_weights "
            "(edited tensors) or save_pretrained (the whole model)"
        )
    options = None if model is None else getattr(unwrapped(model), "config", None)
    if layout == "kohya" and options is None:
        raise ValueError("model: pass it, layout='kohya' names layers after its configuration")
    factors = adapter_factors(edit, _base_weights(erasure, model))
    tensors, metadata = in_layout(factors, layout, component, options)
    write(file, tensors, metadata | erasure.metadata())
    use: Use = "lora-kohya" if layout == "kohya" else "lora-diffusers"
    write_card(file, erasure, use=use, component=component, alone=file != path)
    return file


def save_weights(erasure: Erasure, path: Path, model: nn.Module) -> Path:
    """Writes the edited tensors alone, as `Erasure.save_weights`."""
    tensors = erasure.state_dict(model)
    if not tensors:
        raise ValueError("this erasure changes nothing, so there are no tensors to save")
    write(path, tensors, {"format": "pt", **erasure.metadata()})
    write_card(path, erasure, use="weights", component=component_of(erasure.provenance))
    return path


def save_single_file(
    erasure: Erasure, path: Path, checkpoint: Path, model: nn.Module | None
) -> Path:
    """Writes a checkpoint with the edit in it, as `Erasure.save_single_file`."""
    if path.exists() and path.samefile(checkpoint):
        raise ValueError(f"path: {path} is the checkpoint itself; name another file")
    base = _base_weights(erasure, model)
    replaced: dict[str, Tensor] = {}
    for name, keys in find_weights(checkpoint, base).items():
        if not keys:
            raise BaseModelMismatchError(
                f"checkpoint: {checkpoint} does not hold the weight of {name}; expected the "
                "file that this model was loaded from (from_single_file)"
            )
        for key, tensor in keys.items():
            edited = erasure.edited_weights({name: tensor})[name]
            if key in replaced and not torch.equal(replaced[key], edited):
                raise ValueError(
                    f"checkpoint: {key} is the weight of several layers that are edited "
                    "differently, so it can't be told whose it is"
                )
            replaced[key] = edited
    patch(checkpoint, path, replaced, erasure.metadata())
    write_card(path, erasure, use="single-file", component=component_of(erasure.provenance))
    return path


def save_pretrained(erasure: Erasure, folder: Path, model: nn.Module) -> Path:
    """Writes the whole edited model, as `Erasure.save_pretrained`."""
    if not is_last(erasure, model):
        raise ValueError("model: this erasure is not what was applied to it last; apply_ it")
    with folder_atomically(folder) as staged:
        whole: Any = unwrapped(model)
        whole.save_pretrained(staged, safe_serialization=True)
        erasure.annotate(staged)
    return folder


def annotate(erasure: Erasure, folder: Path) -> None:
    """Writes what was erased into a folder, as `Erasure.annotate`."""
    for file in sorted(folder.glob("*.safetensors")):
        patch(file, file, {}, erasure.metadata())
    write_card(folder, erasure, use="component", component=component_of(erasure.provenance))


def component_of(provenance: Mapping[str, Any]) -> str:
    """What a pipeline calls the model that an erasure was made for."""
    kind = provenance.get("model_class", "UNet")
    if "ControlNet" in kind and kind not in ENTRANCES:
        return "controlnet"
    return "unet" if kind.startswith("UNet") else "transformer"


def _base_weights(erasure: Erasure, model: nn.Module | None) -> Mapping[str, Tensor]:
    """Un-edited weights of what changes, from the model or from what was kept at its edit."""
    beneath = weights_beneath(erasure, model)
    if beneath is not None:
        return beneath
    edit = edit_of(erasure)
    if model is None and not any(concept_map.rank for concept_map in edit.maps.values()):
        return {}
    with history_lock:
        living = [list(entries) for entries in histories.values()]
    for entries in living if model is None else [applications_of(model)]:
        for entry in entries:
            if is_same(entry.erasure, erasure):
                return dict(entry.originals)
    if model is None:
        raise ValueError(
            "model: the adapter is made from the base model's weights, and this erasure is not "
            "applied to a model in this process; pass model=, the base model"
        )
    layers = layers_of(model, edit, "adapter")
    check_base(model, erasure.provenance.get("base_hashes"), edit.takes)
    return Weights({n: layer for n, layer in layers.items() if edit.changes(n)})


def _loads_adapters(kind: str | None, model: nn.Module | None) -> bool:
    """Whether diffusers loads adapters into a model of that class; None is not known, so it may."""
    import diffusers

    if model is not None:
        return hasattr(unwrapped(model), "load_lora_adapter")
    return kind is None or hasattr(getattr(diffusers, kind, None), "load_lora_adapter")
