"""Prompts in which vectors stand for the tokens of a word: what an attack on a model optimizes.

An attacker who holds the weights need not find words: token vectors that follow the gradient are
worse than any text (textual inversion against erased models, Pham et al., arXiv 2308.01508).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from realera_fast.text.templates import before_word, fill

if TYPE_CHECKING:
    from realera_fast.text.encoders import Text


@dataclass(frozen=True, eq=False)
class FreePrompts:
    """Several prompts, alike but for the vectors that stand for the tokens of a word."""

    template: str
    """What the word is put into: `{}` is its place."""
    word: str
    vectors: Mapping[Any, Tensor]
    """`[j, n, e]` float32 by text encoder: of each prompt one for each token of the word."""

    @classmethod
    def of(cls, text: Text, template: str, word: str, count: int) -> FreePrompts:
        """So many prompts that say the word itself."""
        prompt, before = fill(template, word), before_word(template)
        vectors = {}
        for model in text.models:
            place = model.token_span(before, word)
            ids = model.tokenize([prompt])[0][0, place.start : place.stop]
            table = model.input_embeddings.detach()
            vectors[model.encoder] = table[ids.to(table.device)].float().repeat(count, 1, 1)
        return cls(template, word, vectors)

    @property
    def prompt(self) -> str:
        """Text of all of them: of the word where the vectors stand."""
        return fill(self.template, self.word)

    @property
    def before(self) -> str:
        """What stands in front of the word."""
        return before_word(self.template)

    def __len__(self) -> int:
        return len(next(iter(self.vectors.values())))

    def with_vectors(self, vectors: Iterable[Tensor]) -> FreePrompts:
        """The same prompts with other vectors, by encoder in the order of these."""
        return replace(self, vectors=dict(zip(self.vectors, vectors, strict=True)))
