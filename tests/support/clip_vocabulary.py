"""CLIP's own tokenizer of 49,408 tokens, which the embedded model has."""

from __future__ import annotations

import functools
from typing import Any

from realera_fast.embedded import FOLDER


@functools.cache
def clip_tokenizer() -> Any:
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(FOLDER / "pipeline" / "tokenizer")
