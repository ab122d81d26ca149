"""The erasure as a map on prompt embeddings: no weights change (docs/method.md, section 4).

``W T x = W (T x)``: a pipeline that several tenants share can give each the erasures of its own, by
mapping what the text encoders return before the denoiser sees it.
"""

from __future__ import annotations

from typing import overload

from torch import Tensor, nn

from realera_fast.solver.concept_map import ConceptMap


class PromptMap(nn.Module):
    """Turns prompt embeddings into erased ones::

        erased = erasure.prompt_map()
        embeds, negative = pipe.encode_prompt("a cat", device, 1, True)
        pipe(prompt_embeds=erased(embeds), negative_prompt_embeds=erased(negative))

    Edited weights act on negative prompts as well, so map both for the same images. Factors are
    float32 buffers: they move with ``.to(device)``, and the arithmetic is at least float32.
    """

    sequence_left: Tensor
    sequence_right: Tensor
    pooled_left: Tensor | None
    pooled_right: Tensor | None

    def __init__(self, sequence: ConceptMap, pooled: ConceptMap | None = None) -> None:
        """
        Args:
            sequence: of the token embeddings.
            pooled: of the pooled vector, for models that take one (SDXL, SD3, FLUX).
        """
        super().__init__()
        self.register_buffer("sequence_left", sequence.left)
        self.register_buffer("sequence_right", sequence.right)
        self.register_buffer("pooled_left", None if pooled is None else pooled.left)
        self.register_buffer("pooled_right", None if pooled is None else pooled.right)

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
            ValueError: a pooled vector is missing or not expected, or a width does not fit.
        """
        pooled = self.pooled
        if (pooled is None) != (pooled_prompt_embeds is None):
            verb = "does not take" if pooled is None else "takes"
            raise ValueError(
                f"pooled_prompt_embeds: the model of this erasure {verb} a pooled vector; pass "
                + ("the token embeddings alone" if pooled is None else "both")
            )
        mapped = self.sequence(prompt_embeds)
        if pooled is None or pooled_prompt_embeds is None:
            return mapped
        return mapped, pooled(pooled_prompt_embeds)

    def compose(self, other: PromptMap) -> PromptMap:
        """Both erasures at once: `other` on the weights that this one edited, T_self T_other."""
        mine, theirs = self.pooled, other.pooled
        if (mine is None) != (theirs is None):
            raise ValueError("other: expected a map for the same model")
        pooled = None if mine is None or theirs is None else theirs.compose(mine)
        return PromptMap(other.sequence.compose(self.sequence), pooled)
