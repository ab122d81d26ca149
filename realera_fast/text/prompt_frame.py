"""What a pipeline makes of a prompt before its text encoder sees it: cleaning, and text around."""

from __future__ import annotations

import functools
import html
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

_PLACE = "\x1f"
"""Stands for the prompt where a chat template is read: no template has it."""


@dataclass(frozen=True)
class PromptFrame:
    """The text around every prompt."""

    before: str = ""
    after: str = ""
    special_tokens: bool = True
    """Whether the tokenizer adds its own special tokens to all of it."""

    def around(self, prompt: str) -> str:
        """The whole text that is encoded."""
        return f"{self.before}{prompt}{self.after}"


def chat_frame(tokenizer: Any, system: str, options: Mapping[str, Any]) -> PromptFrame:
    """The text that a tokenizer's chat template puts around a prompt of the user.

    Args:
        tokenizer: a transformers tokenizer or processor with a chat template.
        system: the system message; empty for none.
        options: arguments of the template, such as `add_generation_prompt`.

    Raises:
        ValueError: it has no template, or one that does not hold the prompt once.
    """
    # A processor takes pictures as well, so that its messages come in parts.
    in_parts = hasattr(tokenizer, "tokenizer")
    messages = [("system", system)] * bool(system) + [("user", _PLACE)]
    chat = [
        {"role": role, "content": [{"type": "text", "text": said}] if in_parts else said}
        for role, said in messages
    ]
    try:
        text = str(tokenizer.apply_chat_template(chat, tokenize=False, **options))
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(
            f"tokenizer: the {type(tokenizer).__name__} makes no chat of a prompt ({error}); pass "
            "the pipeline's own, which has a chat_template"
        ) from error
    before, _, after = text.partition(_PLACE)
    if text.count(_PLACE) != 1:
        raise ValueError(
            "tokenizer: its chat template does not hold the prompt once, as it is, so it is not "
            "known what stands around it"
        )
    own = getattr(tokenizer, "tokenizer", tokenizer)
    begin = getattr(own, "bos_token", None)
    # As `apply_chat_template` does it: a template that begins the text itself needs no other token.
    return PromptFrame(before, after, not (begin and before.startswith(str(begin))))


def cleaned(prompt: str) -> str:
    """A prompt without HTML entities and doubled spaces, as Wan's pipelines clean it.

    They mend broken encodings too where `ftfy` is installed, and so does this.
    """
    mend = _mender()
    prompt = prompt if mend is None else mend(prompt)
    return " ".join(html.unescape(html.unescape(prompt)).split())


@functools.cache
def _mender() -> Callable[[str], str] | None:
    if importlib.util.find_spec("ftfy") is None:
        return None
    mend: Callable[[str], str] = importlib.import_module("ftfy").fix_text
    return mend
