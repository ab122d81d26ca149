"""The erasure as a map on prompt embeddings: no weights change (docs/method.md, section 4).

``W T x = W (T x)``: a pipeline that several tenants share can give each the erasures of its own, by
mapping what the text encoders return before the denoiser sees it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import overload

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from realera_fast.runtime import read_header, write
from realera_fast.solver.concept_map import ConceptMap
from realera_fast.solver.prompt_gate import PromptGate


class PromptMap(nn.Module):
    """Turns prompt embeddings into erased ones::

        erased = erasure.prompt_map()
        embeds, negative = pipe.encode_prompt("a cat", device, 1, True)
        pipe(prompt_embeds=erased(embeds), negative_prompt_embeds=erased(negative))

    Edited weights act on negative prompts as well, so map both for the same images. Factors are
    float32 buffers: they move with ``.to(device)``, and the arithmetic is at least float32.

    With gates, a prompt that opens none of them comes out bit-identical, each of a batch by itself.
    """

    sequence_left: Tensor
    sequence_right: Tensor
    pooled_left: Tensor | None
    pooled_right: Tensor | None
    gates: nn.ModuleList
    earlier: PromptMap | None

    def __init__(
        self,
        sequence: ConceptMap,
        pooled: ConceptMap | None = None,
        gates: Iterable[PromptGate] = (),
        earlier: PromptMap | None = None,
    ) -> None:
        """
        Args:
            sequence: of the token embeddings.
            pooled: of the pooled vector, for models that take one (SDXL, SD3, FLUX).
            gates: only prompts that open one of these are mapped; without any, all are.
            earlier: a map that goes before this one. The gates of both see the prompt as it came.
        """
        super().__init__()
        self.register_buffer("sequence_left", sequence.left)
        self.register_buffer("sequence_right", sequence.right)
        self.register_buffer("pooled_left", None if pooled is None else pooled.left)
        self.register_buffer("pooled_right", None if pooled is None else pooled.right)
        self.gates = nn.ModuleList(gates)
        self.earlier = earlier
        for gate in self.gates:
            if not isinstance(gate, PromptGate) or gate.center.shape != (sequence.width,):
                raise ValueError(f"gates: expected PromptGate objects of width {sequence.width}")

    @property
    def sequence(self) -> ConceptMap:
        """The map of the token embeddings."""
        return ConceptMap(self.sequence_left, self.sequence_right)

    @property
    def pooled(self) -> ConceptMap | None:
        """The map of the pooled vector."""
        if self.pooled_left is None or self.pooled_right is None:
            return None
        return ConceptMap(self.pooled_left, self.pooled_right)

    @overload
    def forward(self, prompt_embeds: Tensor) -> Tensor: ...

    @overload
    def forward(
        self, prompt_embeds: Tensor, pooled_prompt_embeds: Tensor
    ) -> tuple[Tensor, Tensor]: ...

    def forward(
        self, prompt_embeds: Tensor, pooled_prompt_embeds: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Maps embeddings of any floating dtype; the result has the same one.

        Args:
            prompt_embeds: `[b, t, d]`.
            pooled_prompt_embeds: `[b, q]`, where the model takes them.

        Returns:
            The mapped token embeddings, or both as a pair where both are given.

        Raises:
            ValueError: a pooled vector is missing or not expected, or a shape does not fit; with
                gates also embeddings that hold NaN or infinity, as no gate can judge these.
        """
        pooled = self.pooled
        if (pooled is None) != (pooled_prompt_embeds is None):
            verb = "does not take" if pooled is None else "takes"
            raise ValueError(
                f"pooled_prompt_embeds: the model of this erasure {verb} a pooled vector; pass "
                + ("the token embeddings alone" if pooled is None else "both")
            )
        if self.is_gated:
            _check_gated(prompt_embeds, pooled_prompt_embeds)
        mapped, mapped_pooled = self._mapped(prompt_embeds, pooled_prompt_embeds, prompt_embeds)
        return mapped if mapped_pooled is None else (mapped, mapped_pooled)

    @property
    def is_gated(self) -> bool:
        """Whether some prompts are left as they are."""
        return len(self.gates) > 0 or (self.earlier is not None and self.earlier.is_gated)

    def opened(self, prompt_embeds: Tensor) -> Tensor:
        """`[b]` bool, which of `[b, t, d]` prompts are mapped, by this map or one before it."""
        if not self.is_gated:
            return prompt_embeds.new_ones(len(prompt_embeds), dtype=torch.bool)
        _check_gated(prompt_embeds, None)
        before = self.earlier
        mine = self._opened(prompt_embeds)
        return mine if before is None else mine | before.opened(prompt_embeds)

    def _opened(self, prompt_embeds: Tensor) -> Tensor:
        if not self.gates:
            return prompt_embeds.new_ones(len(prompt_embeds), dtype=torch.bool)
        return torch.stack([gate(prompt_embeds) for gate in self.gates]).any(dim=0)

    def _mapped(
        self, embeds: Tensor, pooled_embeds: Tensor | None, given: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """What becomes of embeddings whose prompt came as `given`."""
        if self.earlier is not None:
            embeds, pooled_embeds = self.earlier._mapped(embeds, pooled_embeds, given)
        pooled = self.pooled
        mapped, mapped_pooled = self.sequence(embeds), None
        if pooled is not None and pooled_embeds is not None:
            mapped_pooled = pooled(pooled_embeds)
        if self.gates:
            opened = self._opened(given)
            mapped = torch.where(opened[:, None, None], mapped, embeds)
            if mapped_pooled is not None and pooled_embeds is not None:
                mapped_pooled = torch.where(opened[:, None], mapped_pooled, pooled_embeds)
        return mapped, mapped_pooled

    def compose(self, other: PromptMap) -> PromptMap:
        """Both erasures at once: `other` on the weights that this one edited, T_self T_other.

        Where one of them has gates, each maps the prompts that its own gates open for.
        """
        mine, theirs = self.pooled, other.pooled
        if (mine is None) != (theirs is None) or self.sequence.width != other.sequence.width:
            raise ValueError("other: expected a map for the same model")
        if self.is_gated or other.is_gated:
            before = other if self.earlier is None else self.earlier.compose(other)
            composed = PromptMap(self.sequence, mine, earlier=before)
            composed.gates = self.gates
            return composed
        pooled = None if mine is None or theirs is None else theirs.compose(mine)
        return PromptMap(other.sequence.compose(self.sequence), pooled)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes the map with its gates as one safetensors file, for where there are no text
        encoders to calibrate a gate with."""
        tensors = {n: value.detach().cpu().contiguous() for n, value in self.state_dict().items()}
        return write(Path(path), tensors, {_FORMAT: "1"})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> PromptMap:
        """The inverse of `save`.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is not one that `save` wrote.
        """
        if read_header(Path(path)).metadata.get(_FORMAT) != "1":
            raise ValueError(f"{path}: not a prompt map; write one with PromptMap.save")
        return _map_of(load_file(path))


_FORMAT = "realera_fast.prompt_map"
"""Key of the metadata that tells such a file, and the version of its layout."""


def is_prompt_map(path: str | os.PathLike[str]) -> bool:
    """Whether a safetensors file is one that `PromptMap.save` wrote."""
    return _FORMAT in read_header(Path(path)).metadata


def _map_of(tensors: Mapping[str, Tensor]) -> PromptMap:
    """What has these buffers."""
    pooled = None
    if "pooled_left" in tensors:
        pooled = ConceptMap(tensors["pooled_left"], tensors["pooled_right"])
    numbers = {int(name.split(".")[1]) for name in tensors if name.startswith("gates.")}
    gates = [PromptGate(*(tensors[f"gates.{n}.{part}"] for part in _GATE)) for n in sorted(numbers)]
    before = {
        name.removeprefix("earlier."): value
        for name, value in tensors.items()
        if name.startswith("earlier.")
    }
    found = PromptMap(
        ConceptMap(tensors["sequence_left"], tensors["sequence_right"]),
        pooled,
        gates,
        _map_of(before) if before else None,
    )
    # Directions are scaled to length 1 when a gate is made: here they have it to the last bit.
    found.load_state_dict(dict(tensors))
    return found


_GATE = ("center", "directions", "thresholds")


def _check_gated(prompt_embeds: Tensor, pooled_prompt_embeds: Tensor | None) -> None:
    """Refuses what a gate can't judge: a number that is none would shut it."""
    if not prompt_embeds.is_floating_point():
        raise ValueError(f"prompt_embeds: expected a floating dtype, got {prompt_embeds.dtype}")
    given = {"prompt_embeds": prompt_embeds, "pooled_prompt_embeds": pooled_prompt_embeds}
    for name, tensor in given.items():
        if tensor is not None and not bool(tensor.isfinite().all()):
            raise ValueError(f"{name}: holds NaN or infinity, which no gate can judge")
    if (
        pooled_prompt_embeds is not None
        and pooled_prompt_embeds.shape[:-1] != (prompt_embeds.shape[:1])
    ):
        raise ValueError(
            "pooled_prompt_embeds: expected one vector a prompt, shape "
            f"[{len(prompt_embeds)}, q], got {list(pooled_prompt_embeds.shape)}"
        )
