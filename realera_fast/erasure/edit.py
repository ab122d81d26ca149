"""What an erasure adds to the weights of a model.

    W' = W + (W L) R + up @ down

L and R are the closed form's map, shared by all projections of the token sequence (those of a
pooled vector have one of their own); up and down the alignment's LoRA factors of each, and of
queries, outputs and self-attention where these were trained. The sum is made in float32 (float64
for float64 weights) and rounded once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from realera_fast import ops
from realera_fast.models import LoraFactors, Maps, Stream, is_self_attention, stream_of
from realera_fast.solver import ConceptMap

if TYPE_CHECKING:
    from realera_fast.erasure.erasure import Erasure

MAP_KEYS: Mapping[Stream, str] = {"sequence": "map", "pooled": "pooled"}
"""How the names of a map's tensors begin, by the text that it is of."""


@dataclass(frozen=True, eq=False)
class Edit:
    """The factors of an erasure, and which layers they are for."""

    maps: Mapping[Stream, ConceptMap]
    """The closed form of each text that the model takes, that of the token sequence first."""
    lora: Mapping[str, LoraFactors]
    """Alignment factors by layer name."""
    takes: Maps | None
    """Which text each layer takes, where the caller said it; None is what is known of the class."""
    self_attention: bool = False
    """Whether layers of self-attention have factors: by their names text could enter them."""

    def map_of(self, name: str) -> ConceptMap | None:
        """The map of what a layer takes; None for one that takes no text."""
        if self.self_attention and is_self_attention(name):
            return None
        stream = stream_of(name) if self.takes is None else self.takes.get(name)
        return None if stream is None else self.maps.get(stream)

    def changes(self, name: str) -> bool:
        """Whether a layer gets other weights."""
        concept_map = self.map_of(name)
        return name in self.lora or (concept_map is not None and concept_map.rank > 0)

    def tensors(self) -> dict[str, Tensor]:
        """All factors, by their names in a file."""
        tensors = {}
        for stream, concept_map in self.maps.items():
            tensors[f"{MAP_KEYS[stream]}.left"] = concept_map.left
            tensors[f"{MAP_KEYS[stream]}.right"] = concept_map.right
        for name, factors in self.lora.items():
            tensors[f"lora.{name}.down"] = factors.down
            tensors[f"lora.{name}.up"] = factors.up
        return tensors

    def edited(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The edited weights, as `Erasure.edited_weights`.

        Args:
            weights: `[o, d]` un-edited weight of each layer name; any may be left out.

        Returns:
            New tensors of the same dtype; where nothing changes, the given tensor itself.

        Raises:
            ValueError: an edited weight overflows its dtype.
        """
        edited = dict(weights)
        changed = [name for name in weights if self.changes(name)]
        for name in changed:
            weight = weights[name]
            wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
            # The dtype that the sum is made in: with LoRA to come it must not be rounded between.
            dtype = wide if name in self.lora else weight.dtype
            edited[name] = weight.detach().to(dtype, copy=True)
        for concept_map in self.maps.values():
            mapped = [name for name in changed if self.map_of(name) is concept_map]
            if not (concept_map.rank and mapped):
                continue
            device = edited[mapped[0]].device
            left, right = concept_map.left.to(device), concept_map.right.to(device)
            # The text's features come first; what else a weight takes stays as it is.
            parts = [edited[name][:, : concept_map.width].contiguous() for name in mapped]
            ops.low_rank_update_(parts, left, right)
            for name, part in zip(mapped, parts, strict=True):
                if part.data_ptr() != edited[name].data_ptr():
                    edited[name][:, : concept_map.width] = part
        for name in changed:
            if name in self.lora:
                wide_weight, factors = edited[name], self.lora[name]
                up, down = factors.up.to(wide_weight), factors.down.to(wide_weight)
                # Not `addmm_`: some BLAS would round at the weight's magnitude with every term.
                wide_weight[:, : down.shape[1]] += up @ down
                edited[name] = wide_weight.to(weights[name].dtype)
            if not edited[name].isfinite().all():
                raise ValueError(
                    f"{name}.weight overflows {weights[name].dtype} when edited; "
                    "convert the model to bfloat16 or float32 first"
                )
        return edited


def edit_of(erasure: Erasure) -> Edit:
    """What an erasure adds to the weights."""
    maps: dict[Stream, ConceptMap] = {"sequence": erasure.map}
    if erasure.pooled_map is not None:
        maps["pooled"] = erasure.pooled_map
    made = erasure.provenance
    takes = (made.get("reading") or {}).get("maps")
    return Edit(maps, erasure.lora, takes, bool(made.get("self_attention")))


def is_same(erasure: Erasure, other: Erasure) -> bool:
    """The same factors for the same base: a loaded copy may undo what the original did."""
    return erasure is other or erasure.fingerprint == other.fingerprint


class EditedWeights(Mapping[str, Tensor]):
    """`[o, d]` weights as an erasure makes them, by layer name, computed when one is asked for."""

    def __init__(self, erasure: Erasure, weights: Mapping[str, Tensor]) -> None:
        self._edit, self._weights = edit_of(erasure), weights

    def __getitem__(self, name: str) -> Tensor:
        return self._edit.edited({name: self._weights[name]})[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)
