"""Words whose place is known, for tests of what is done with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from realera_fast.mining import KnownWords, Line
from realera_fast.mining.known_words import Read
from realera_fast.mining.word_space import WordSpace
from realera_fast.text import Lexicon, TokenWords


class ReadText:
    """An encoder that has read every word that it will be asked for."""

    def __init__(self, rows: Mapping[str, Sequence[float]]) -> None:
        self.rows = {word: torch.tensor(row, dtype=torch.float32) for word, row in rows.items()}
        self.width = len(next(iter(self.rows.values())))

    def last_rows(self, prompts: Sequence[str], *, progress: bool | None = False) -> Tensor:
        zero = torch.zeros(self.width)
        words = [prompt.removeprefix("a photo of a ") for prompt in prompts]
        return torch.stack([self.rows.get(word, zero) for word in words])


def known_words(
    tokens: Mapping[str, Sequence[float]],
    others: Mapping[str, Sequence[float]],
    *,
    unknown: float = 0.6,
    related: float = 0.4,
) -> KnownWords:
    """Words of a tokenizer, and others, by their rows; the mean word lies in the origin.

    Args:
        unknown, related: the lines.
    """
    words = tuple(tokens)
    text = ReadText({**tokens, **others})
    rows = torch.stack([text.rows[word] for word in words]).half()
    known = TokenWords(words, tuple(range(len(words))), ("lemma",) * len(words), 1.0, False)
    return KnownWords(
        text,  # type: ignore[arg-type]
        Lexicon.load(),
        Read(known, words, {}, words, rows),
        WordSpace(torch.zeros(text.width).double(), torch.eye(text.width).double()),
        Line(unknown, related, "lexicon", {}, {}),
    )
