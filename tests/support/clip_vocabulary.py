"""CLIP's own tokenizer of 49,408 tokens, where there is one."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
TOKENS = 49_408
PLACES = (
    ROOT / "realera_fast" / "embedded" / "pipeline" / "tokenizer",
    # Where the training of the embedded model builds it.
    ROOT / "build" / "embedded" / "tokenizer",
)


@functools.cache
def _found() -> Any:
    from transformers import CLIPTokenizer

    for place in PLACES:
        if place.is_dir():
            tokenizer = CLIPTokenizer.from_pretrained(place)
            if len(tokenizer) == TOKENS:
                return tokenizer
    return None


def clip_tokenizer() -> Any:
    """The tokenizer; the test is skipped where there is none."""
    tokenizer = _found()
    if tokenizer is None:
        pytest.skip(f"needs CLIP's tokenizer of {TOKENS} tokens in build/embedded/tokenizer")
    return tokenizer
