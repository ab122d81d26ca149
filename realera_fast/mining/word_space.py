"""Words as the denoiser sees them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from realera_fast.text import Text

_PROMPT = "a photo of a {}"
"""What is read of a word (ours: the bare word and other prompts tell relatives no better)."""


def read_words(text: Text, words: Sequence[str], *, progress: bool | None = False) -> Tensor:
    """`[w, d]` float32 rows in which a causal encoder has read the whole word."""
    return text.last_rows([_PROMPT.format(word) for word in words], progress=progress)


@dataclass(frozen=True)
class WordSpace:
    """Where words lie: seen from the mean word, in the metric of what attention writes of them.

    Text encoders put all prompts into a narrow cone; without the mean every cosine is near 1.
    """

    mean: Tensor
    """`[d]` float64 row of the mean word."""
    gram: Tensor
    """`[d, d]` float64 metric (`models.value_gram`)."""

    def cosines(self, rows: Tensor, others: Tensor) -> Tensor:
        """`[n, m]` float64 cosines, on the CPU, between `[n, d]` rows and `[m, d]` others.

        A row that does not differ from the mean word has cosine 0 with all.
        """
        x, y = self.seen(rows), self.seen(others)
        product = (x @ self.gram) @ y.mT
        scale = self.sizes(x)[:, None] * self.sizes(y)
        return torch.where(scale > 0, product / scale.clamp_min(1e-300), 0.0).cpu()

    def pairwise(self, rows: Tensor, others: Tensor) -> Tensor:
        """`[n]` float64 cosines, on the CPU, of each of `[n, d]` rows with its own of others."""
        x, y = self.seen(rows), self.seen(others)
        scale = self.sizes(x) * self.sizes(y)
        product = ((x @ self.gram) * y).sum(dim=1)
        return torch.where(scale > 0, product / scale.clamp_min(1e-300), 0.0).cpu()

    def shares(self, ways: Tensor, whole: Tensor) -> Tensor:
        """`[n]` how much of each of `[n, d]` float64 differences lies in another: 1 if all of it
        does and is as long."""
        across = self.sizes(whole).square().clamp_min(1e-300)
        return ((ways @ self.gram) * whole).sum(dim=1) / across

    def lengths(self, rows: Tensor) -> Tensor:
        """`[n]` float64, on the CPU: how much the model writes of `[n, d]` rows; little of words
        that it does not know."""
        return self.sizes(self.seen(rows)).cpu()

    def seen(self, rows: Tensor) -> Tensor:
        """`[n, d]` float64 rows from the mean word."""
        return rows.to(self.mean) - self.mean

    def sizes(self, ways: Tensor) -> Tensor:
        """`[n]` lengths of `[n, d]` float64 differences of rows."""
        return ((ways @ self.gram) * ways).sum(dim=1).clamp_min(0).sqrt()
