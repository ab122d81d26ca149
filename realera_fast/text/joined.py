"""Several text encoders read as one."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor, nn

from realera_fast.text.encoders import Span, Text, TextModel
from realera_fast.text.free_prompts import FreePrompts


class JoinedText:
    """Several encoders' embeddings of one prompt, side by side in each row (SDXL, SD3).

    The tokenizers have to agree on where words stand; the first one says it.

    Args:
        parts: the encoders in the order of their features.
        width: features of a row; zeros fill what the parts leave (SD3); `None` adds none.
    """

    def __init__(self, parts: Sequence[TextModel], width: int | None = None) -> None:
        self.parts = tuple(parts)
        self._own = sum(part.width for part in parts)
        self.width = self._own if width is None else width
        lengths = {part.max_tokens for part in parts}
        if len(lengths) != 1 or self.width < self._own:
            raise ValueError(
                f"text_encoders: expected prompts of one length and at most {self.width} features "
                f"together, got {sorted(lengths)} tokens and {self._own} features"
            )
        self.max_tokens = lengths.pop()
        self.device = parts[0].device
        self.reads_unpadded = all(part.reads_unpadded for part in parts)
        self.parameters_per_token = sum(part.parameters_per_token for part in parts)

    @property
    def first(self) -> TextModel:
        """The encoder whose tokenizer says what words there are."""
        return self.parts[0]

    @property
    def models(self) -> tuple[TextModel, ...]:
        """All encoders."""
        return self.parts

    def token_ids(self, text: str) -> list[int]:
        """Tokens of a text alone, without special ones, never cut."""
        return self.parts[0].token_ids(text)

    def name_key(self, name: str) -> Hashable:
        """Equal for names that are the same tokens to every encoder."""
        return tuple(part.name_key(name) for part in self.parts)

    def control_token(self, text: str) -> str | None:
        """A control token of a tokenizer that the text holds, if any."""
        return next(filter(None, (part.control_token(text) for part in self.parts)), None)

    def unknown(self, name: str) -> bool:
        """Whether a tokenizer has no token of its own for a part of the name."""
        return any(part.unknown(name) for part in self.parts)

    def overflow(self, prompt: str) -> str:
        """The end of a prompt that would not be seen; `""` if all is."""
        return max((part.overflow(prompt) for part in self.parts), key=len)

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """`[p, t, d]` float32 embeddings, on the first encoder's device."""
        found = [part.encode(prompts).to(self.device) for part in self.parts]
        return nn.functional.pad(torch.cat(found, dim=-1), (0, self.width - self._own))

    def encode_visible(self, prompts: Sequence[str]) -> Tensor:
        """`[p, t, d]` float32: the rows of `encode` that the denoiser sees, and any others."""
        found = [part.encode_visible(prompts).to(self.device) for part in self.parts]
        return nn.functional.pad(torch.cat(found, dim=-1), (0, self.width - self._own))

    def encode_free(self, prompts: FreePrompts) -> Tensor:
        """`[j, t, d]` float32 embeddings, with gradients of their vectors where these ask for
        them."""
        found = [part.encode_free(prompts).to(self.device) for part in self.parts]
        return nn.functional.pad(torch.cat(found, dim=-1), (0, self.width - self._own))

    @property
    def is_causal(self) -> bool:
        """Whether a row depends on what stands before it alone."""
        return all(part.is_causal for part in self.parts)

    def first_rows(self, prompts: Sequence[str], counts: Sequence[int]) -> Tensor:
        """`[sum of counts, d]` float32: of each prompt so many rows, for causal encoders."""
        found = [part.first_rows(prompts, counts).to(self.device) for part in self.parts]
        return nn.functional.pad(torch.cat(found, dim=-1), (0, self.width - self._own))

    def last_rows(self, prompts: Sequence[str], *, progress: bool | None = False) -> Tensor:
        """`[p, d]` float32 rows of the last token of each prompt, on the first encoder's device."""
        found = [p.last_rows(prompts, progress=progress).to(self.device) for p in self.parts]
        return nn.functional.pad(torch.cat(found, dim=-1), (0, self.width - self._own))

    def span(self, before: str, word: str) -> Span:
        """Rows of a word that follows the text `before` in a prompt."""
        return self.parts[0].span(before, word)

    def ends(self, prompts: Sequence[str]) -> list[int]:
        """Row of the last token of each prompt."""
        return self.parts[0].ends(prompts)

    def shares(self, prompts: Sequence[str]) -> Tensor:
        """`[p, t]` float64 weights of the rows, a sum of 1 each; 0 for rows that carry no text."""
        return self.parts[0].shares(prompts)

    def fingerprint(self) -> str:
        """SHA-256 of everything that the embeddings depend on."""
        parts = [part.fingerprint() for part in self.parts]
        return hashlib.sha256(f"{parts} {self.width}".encode()).hexdigest()


class TextInSections:
    """Sections of a token sequence one after the other (SD3: CLIP, then T5), for noise alignment.

    Words are looked for in the first one, whose rows alone carry weight: the closed form reads each
    section by itself.

    Args:
        sections: of one width.
    """

    def __init__(self, sections: Sequence[Text]) -> None:
        self.sections = tuple(sections)
        self.width, self.device = sections[0].width, sections[0].device
        self.max_tokens = sum(section.max_tokens for section in sections)
        self.reads_unpadded = sections[0].reads_unpadded
        self.parameters_per_token = sum(section.parameters_per_token for section in sections)

    @property
    def first(self) -> TextModel:
        """The encoder whose tokenizer says what words there are."""
        return self.sections[0].first

    @property
    def models(self) -> tuple[TextModel, ...]:
        """All encoders."""
        return tuple(model for section in self.sections for model in section.models)

    def token_ids(self, text: str) -> list[int]:
        """Tokens of a text alone, without special ones, never cut."""
        return self.sections[0].token_ids(text)

    def name_key(self, name: str) -> Hashable:
        """Equal for names that are the same tokens to every encoder."""
        return tuple(section.name_key(name) for section in self.sections)

    def control_token(self, text: str) -> str | None:
        """A control token of a tokenizer that the text holds, if any."""
        return next(filter(None, (s.control_token(text) for s in self.sections)), None)

    def unknown(self, name: str) -> bool:
        """Whether a tokenizer has no token of its own for a part of the name."""
        return any(section.unknown(name) for section in self.sections)

    def overflow(self, prompt: str) -> str:
        """The longest end of a prompt that a section would not see; `""` if all see all."""
        return max((section.overflow(prompt) for section in self.sections), key=len)

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """`[p, t, d]` float32 embeddings, on the first section's device."""
        found = [section.encode(prompts).to(self.device) for section in self.sections]
        return torch.cat(found, dim=1)

    def encode_visible(self, prompts: Sequence[str]) -> Tensor:
        """`[p, t, d]` float32 embeddings: all of them, as it is drawn from."""
        return self.encode(prompts)

    def encode_free(self, prompts: FreePrompts) -> Tensor:
        """`[j, t, d]` float32 embeddings, with gradients of their vectors where these ask for
        them."""
        found = [section.encode_free(prompts).to(self.device) for section in self.sections]
        return torch.cat(found, dim=1)

    @property
    def is_causal(self) -> bool:
        """Never: later sections stand behind the first one's padding."""
        return False

    def first_rows(self, prompts: Sequence[str], counts: Sequence[int]) -> Tensor:
        """`[sum of counts, d]` float32: of each prompt so many rows of the first section."""
        return self.sections[0].first_rows(prompts, counts)

    def last_rows(self, prompts: Sequence[str], *, progress: bool | None = False) -> Tensor:
        """`[p, d]` float32 rows of the last token of each prompt in the first section."""
        return self.sections[0].last_rows(prompts, progress=progress)

    def span(self, before: str, word: str) -> Span:
        """Rows of a word that follows the text `before` in a prompt."""
        return self.sections[0].span(before, word)

    def ends(self, prompts: Sequence[str]) -> list[int]:
        """Row of the last token of each prompt in the first section."""
        return self.sections[0].ends(prompts)

    def shares(self, prompts: Sequence[str]) -> Tensor:
        """`[p, t]` float64 weights of the rows, a sum of 1 each."""
        first = self.sections[0]
        return nn.functional.pad(first.shares(prompts), (0, self.max_tokens - first.max_tokens))

    def fingerprint(self) -> str:
        """SHA-256 of everything that the embeddings depend on."""
        parts = [section.fingerprint() for section in self.sections]
        return hashlib.sha256(f"sections {parts}".encode()).hexdigest()


class TextWithPooled:
    """A token sequence whose last row is the pooled vector (SDXL, SD3, FLUX), for noise alignment.

    Zeros fill the row up. It carries no weight: the closed form has the vector as a stream of its
    own.
    """

    def __init__(self, sequence: Text, pooled: Text) -> None:
        """
        Args:
            pooled: of at most as many features as the sequence has.
        """
        self.sequence, self.pooled = sequence, pooled
        self.width, self.device = sequence.width, sequence.device
        self.max_tokens = sequence.max_tokens + 1
        self.reads_unpadded = sequence.reads_unpadded
        self.parameters_per_token = sequence.parameters_per_token

    @property
    def first(self) -> TextModel:
        """The encoder whose tokenizer says what words there are."""
        return self.sequence.first

    @property
    def models(self) -> tuple[TextModel, ...]:
        """All encoders; the one that gives the pooled vector, too, is there twice."""
        return (*self.sequence.models, *self.pooled.models)

    def token_ids(self, text: str) -> list[int]:
        """Tokens of a text alone, without special ones, never cut."""
        return self.sequence.token_ids(text)

    def name_key(self, name: str) -> Hashable:
        """Equal for names that are the same tokens to both."""
        return (self.sequence.name_key(name), self.pooled.name_key(name))

    def control_token(self, text: str) -> str | None:
        """A control token of a tokenizer that the text holds, if any."""
        return self.sequence.control_token(text) or self.pooled.control_token(text)

    def unknown(self, name: str) -> bool:
        """Whether a tokenizer has no token of its own for a part of the name."""
        return self.sequence.unknown(name) or self.pooled.unknown(name)

    def overflow(self, prompt: str) -> str:
        """The end of a prompt that would not be seen; `""` if all is."""
        return self.sequence.overflow(prompt)

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """`[p, t + 1, d]` float32 embeddings."""
        row = self.pooled.encode(prompts).to(self.device)
        row = nn.functional.pad(row, (0, self.width - self.pooled.width))
        return torch.cat((self.sequence.encode(prompts), row), dim=1)

    def encode_visible(self, prompts: Sequence[str]) -> Tensor:
        """`[p, t + 1, d]` float32 embeddings: all of them, as it is drawn from."""
        return self.encode(prompts)

    def encode_free(self, prompts: FreePrompts) -> Tensor:
        """`[j, t + 1, d]` float32 embeddings, with gradients of their vectors where these ask for
        them."""
        row = self.pooled.encode_free(prompts).to(self.device)
        row = nn.functional.pad(row, (0, self.width - self.pooled.width))
        return torch.cat((self.sequence.encode_free(prompts), row), dim=1)

    @property
    def is_causal(self) -> bool:
        """Never: the pooled vector depends on the whole prompt."""
        return False

    def first_rows(self, prompts: Sequence[str], counts: Sequence[int]) -> Tensor:
        """`[sum of counts, d]` float32: of each prompt so many rows, without the pooled vector."""
        return self.sequence.first_rows(prompts, counts)

    def last_rows(self, prompts: Sequence[str], *, progress: bool | None = False) -> Tensor:
        """`[p, d]` float32 rows of the last token of each prompt, without the pooled vector."""
        return self.sequence.last_rows(prompts, progress=progress)

    def span(self, before: str, word: str) -> Span:
        """Rows of a word that follows the text `before` in a prompt."""
        return self.sequence.span(before, word)

    def ends(self, prompts: Sequence[str]) -> list[int]:
        """Row of the last token of each prompt."""
        return self.sequence.ends(prompts)

    def shares(self, prompts: Sequence[str]) -> Tensor:
        """`[p, t + 1]` float64 weights of the rows, a sum of 1 each."""
        return nn.functional.pad(self.sequence.shares(prompts), (0, 1))

    def fingerprint(self) -> str:
        """SHA-256 of everything that the embeddings depend on."""
        both = f"{self.sequence.fingerprint()} {self.pooled.fingerprint()}"
        return hashlib.sha256(both.encode()).hexdigest()
