"""Reading prompts without most of their padding, which is nine tenths of a short one.

A causal encoder gives the rows of a text without what comes after it. The rows of padding are
nearly parallel: those of some prompts, which weigh more for it, stand for those of the others.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from realera_fast.text.encoders import Text

_SHARE = 8
"""Of so many prompts the padding of one is read where it can stand for the others' (ours)."""


def shared_paddings(count: int, number: int) -> list[float]:
    """What the padding of each of so many prompts weighs, 0 where it is not read.

    Args:
        number: decides which are read, another one for each number: over many, every prompt has its
            share.
    """
    every = min(count, _SHARE)
    return [float(every * (place % every == number % every)) for place in range(count)]


def read_rows(text: Text, prompts: Sequence[str], paddings: Sequence[float] | None) -> Tensor:
    """`[p, t, d]` float32 rows of prompts; anything finite where padding is not read.

    Args:
        paddings: what the padding of each prompt weighs, 0 where only its first row is read; None
            reads everything, as encoders that are not causal must.
    """
    if prompts and text.max_tokens == 1 and text.reads_unpadded:
        # The pooled vector is that of the last token.
        return text.last_rows(prompts)[:, None]
    if not prompts or paddings is None or all(paddings) or not text.is_causal:
        return text.encode_visible(prompts)
    most = text.max_tokens
    ends = text.ends(prompts)
    counts = [
        most if padding else min(end + 2, most) for padding, end in zip(paddings, ends, strict=True)
    ]
    rows = text.first_rows(prompts, counts)
    hidden = rows.new_zeros(len(prompts), most, text.width)
    places = torch.arange(most, device=rows.device)
    hidden[places < torch.tensor(counts, device=rows.device)[:, None]] = rows
    return hidden


def row_weights(text: Text, prompts: Sequence[str], paddings: Sequence[float] | None) -> Tensor:
    """`[p, t]` float64 weights of the rows that `read_rows` gives: a sum of 1 each, on average."""
    weight = text.shares(prompts)
    if prompts and paddings is not None and text.is_causal:
        ends = torch.tensor(text.ends(prompts), device=weight.device)
        # The first row of the padding is always read.
        beyond = torch.arange(weight.shape[1], device=weight.device) > ends[:, None] + 1
        factor = torch.tensor(paddings, dtype=weight.dtype, device=weight.device)[:, None]
        weight = torch.where(beyond, weight * factor, weight)
    return weight


def first_row_weights(text: Text, prompts: Sequence[str]) -> Tensor:
    """`[p, t]` float64 weights of rows, a sum of 1 each; of a causal encoder the first row of the
    padding stands for all of it.

    Beside the padding of every eighth prompt, that weighs eight times as much, it tells the same
    number of rows from more words: the prior of the embedded model then holds them as firmly as
    that of whole prompts does (ours, measured by what each word moves).
    """
    weight = text.shares(prompts)
    if prompts and text.is_causal:
        ends = torch.tensor(text.ends(prompts), device=weight.device)[:, None]
        places = torch.arange(weight.shape[1], device=weight.device)
        beyond = weight * (places > ends + 1)
        # A prompt that fills the encoder has no padding, and nothing beyond.
        first = places == (ends + 1).clamp_max(weight.shape[1] - 1)
        weight = weight - beyond + first * beyond.sum(dim=1, keepdim=True)
    return weight


def read_text_rows(text: Text, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """`[p, t, d]` rows of prompts, and `[p, t]` bool, which of them are there and carry text.

    Of a causal encoder no padding but its first row is read, which is nine tenths of a prompt.
    """
    hidden = read_rows(text, prompts, [0.0] * len(prompts))
    carries = text.shares(prompts) > 0
    if prompts and text.is_causal:
        ends = torch.tensor(text.ends(prompts), device=carries.device)
        carries &= torch.arange(carries.shape[1], device=carries.device) <= ends[:, None] + 1
    return hidden, carries
