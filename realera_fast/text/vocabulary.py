"""What the model can say: words of the tokenizer's own vocabulary, encoded once per text encoder.

They serve twice. Their second moments are the *preserve prior*: what must stay where it is when no
list is given (docs/method.md, section 5). And those that fall inside the neighborhood of a
concept are its *semantic neighbors*, found without any data (docs/method.md, section 3.3).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from realera_fast.runtime import check_types, clean_names, folded, progress_bar, write_atomically
from realera_fast.solver import NormalEquations, Pairs
from realera_fast.text.encoders import Text
from realera_fast.text.prompts import fill

logger = logging.getLogger(__name__)

TEMPLATES = ("{}", "a photo of a {}", "a {} in the style of {word}")
"""Prompts of every word; `{word}` is another word of the vocabulary, so that the prior also holds
compositions."""

_DESCRIBED = TEMPLATES[:2]
_STRIDE = 37


@dataclass(frozen=True)
class VocabularyConfig:
    """The preserve prior."""

    words: int = 1000
    """Whole words of the tokenizer's vocabulary, most common first (count; docs/method.md,
    section 5; ours: so many that a CPU encodes them in minutes)."""

    preserve_scale: float = 40.0
    """Weight of the prior's mean row, and of each word named as preserved, against one target's
    mean row (ratio; ours)."""

    exclude: tuple[str, ...] = ()
    """Words of the tokenizer that are left out: neither preserved nor mined as neighbors, unless
    they are named (default: none)."""

    cache: bool = True
    """Keep the encoded prior on disk, in the Hugging Face assets cache, under a hash of the text
    encoder's weights (default: yes)."""

    def __post_init__(self) -> None:
        check_types(self)
        object.__setattr__(self, "exclude", clean_names(self.exclude, "VocabularyConfig.exclude"))
        if self.words < 0 or not 0 <= self.preserve_scale < math.inf:
            raise ValueError(
                "VocabularyConfig: words and preserve_scale must be finite and >= 0, got "
                f"{self.words} and {self.preserve_scale}"
            )


@dataclass(frozen=True)
class Vocabulary:
    """Encoded words of one text encoder."""

    words: tuple[str, ...]
    descriptors: Tensor
    """`[w, d]` float32: the last token's row of each word, mean over the plain templates."""
    gram: Tensor
    """`[d, d]` float64: second moments, summed over all prompts, mean over the rows of a prompt."""
    prompts: int
    """Number of prompts in `gram`."""
    fingerprint: str
    """Of the text that was read (`Text.fingerprint`)."""

    @property
    def mean(self) -> Tensor:
        """`[d]` mean descriptor."""
        return self.descriptors.mean(dim=0)

    def similarity(self, descriptor: Tensor) -> Tensor:
        """`[w]` cosine between each word and a `[d]` descriptor, both seen from the mean word.

        Text encoders put all prompts into a narrow cone; without the mean every cosine is near 1.
        """
        if not self.words:
            return torch.zeros(0, dtype=torch.float32, device="cpu")
        centered = self.descriptors - self.mean
        return torch.nn.functional.cosine_similarity(centered, descriptor - self.mean, dim=-1)


def _prompts(words: Sequence[str]) -> list[tuple[str, frozenset[str]]]:
    """Every prompt of the prior with the words that it contains."""
    prompts = []
    for index, word in enumerate(words):
        other = words[(index * _STRIDE + 1) % len(words)]
        for template in TEMPLATES:
            used = {word, other} if "{word}" in template else {word}
            prompts.append((fill(template, word, other), frozenset(used)))
    return prompts


def mean_rows(text: Text, prompts: Sequence[str], hidden: Tensor) -> Pairs:
    """Rows of `[p, t, d]` prompts, to keep their place: their weights sum to 1 a prompt."""
    weight = text.shares(prompts).to(hidden.device, torch.float64)
    carries = weight > 0
    rows = hidden[carries]
    return Pairs(rows, rows, weight[carries])


def _accumulate(
    text: Text, prompts: Sequence[str], *, progress: bool | None, desc: str
) -> tuple[Tensor, Tensor]:
    """Summed second moments `[d, d]` and end-of-text rows `[p, d]`, streamed in blocks."""
    equations = NormalEquations(text.width, device=text.device)
    ends = []
    # As many prompts as make 128 MiB of embeddings.
    block = max(1, min(64, (1 << 25) // (text.max_tokens * text.width)))
    with progress_bar(total=len(prompts), desc=desc, progress=progress) as bar:
        for start in range(0, len(prompts), block):
            part = prompts[start : start + block]
            hidden = text.encode(part)
            equations.update(mean_rows(text, part, hidden))
            ends.append(_ends(text, part, hidden))
            bar.update(len(part))
    rows = (
        torch.cat(ends)
        if ends
        else torch.zeros(0, text.width, dtype=torch.float32, device=text.device)
    )
    return equations.gram, rows


def _ends(text: Text, prompts: Sequence[str], hidden: Tensor) -> Tensor:
    """`[p, d]` row of the last token of each of `[p, t, d]` prompts."""
    place = torch.tensor(text.ends(prompts), device=hidden.device)
    return hidden[torch.arange(len(prompts), device=hidden.device), place]


def describe(text: Text, words: Sequence[str]) -> Tensor:
    """`[w, d]` descriptors of any words, comparable with `Vocabulary.descriptors`."""
    prompts = [fill(template, word) for word in words for template in _DESCRIBED]
    rows = _ends(text, prompts, text.encode(prompts))
    return rows.view(len(words), len(_DESCRIBED), -1).mean(dim=1)


def encode_vocabulary(
    text: Text,
    config: VocabularyConfig,
    *,
    words: Sequence[str] | None = None,
    progress: bool | None = False,
) -> Vocabulary:
    """Encodes the vocabulary, or reads it from the cache.

    Args:
        words: what is encoded; `None` asks the tokenizer.
    """
    words = text.words(config.words) if words is None else tuple(words)
    left_out = {folded(word) for word in config.exclude}
    words = tuple(word for word in words if folded(word) not in left_out)
    fingerprint = text.fingerprint()
    path = _cache_path(text, fingerprint, words) if config.cache and words else None
    if path is not None and (cached := _read(path, words)) is not None:
        logger.info("preserve prior read from %s", path)
        return dataclasses.replace(
            cached,
            descriptors=cached.descriptors.to(text.device),
            gram=cached.gram.to(text.device),
            fingerprint=fingerprint,
        )
    if not words:
        empty = torch.zeros(0, text.width, dtype=torch.float32, device=text.device)
        gram = torch.zeros(text.width, text.width, dtype=torch.float64, device=text.device)
        return Vocabulary((), empty, gram, 0, fingerprint)
    prompts = [prompt for prompt, _ in _prompts(words)]
    gram, ends = _accumulate(text, prompts, progress=progress, desc="preserve prior")
    descriptors = ends.view(len(words), len(TEMPLATES), -1)[:, : len(_DESCRIBED)].mean(dim=1)
    vocabulary = Vocabulary(words, descriptors, gram, len(prompts), fingerprint)
    if path is not None:
        _write(path, vocabulary)
    return vocabulary


def preserve_gram(
    text: Text, vocabulary: Vocabulary, excluded: Iterable[str]
) -> tuple[Tensor, int]:
    """The prior's mean second moments without every prompt that holds an excluded word.

    The few excluded prompts are encoded again and subtracted, so that the cache holds one matrix
    and not one per word.

    Returns:
        `[d, d]` float64 mean over the remaining prompts, zeros if there are none; and their number.
    """
    dropped = {folded(word) for word in excluded}
    left_out = [
        prompt
        for prompt, used in _prompts(vocabulary.words)
        if not dropped.isdisjoint(folded(word) for word in used)
    ]
    gram, _ = _accumulate(text, left_out, progress=False, desc="")
    remaining = vocabulary.prompts - len(left_out)
    if remaining == 0:
        # What is left of the sums is rounding, of either sign.
        return torch.zeros_like(gram), 0
    return (vocabulary.gram - gram) / remaining, remaining


def _cache_path(text: Text, fingerprint: str, words: Sequence[str]) -> Path | None:
    from huggingface_hub import cached_assets_path

    key = hashlib.sha256(
        json.dumps(
            [fingerprint, list(words), TEMPLATES, text.max_tokens, text.device.type]
        ).encode()
    ).hexdigest()
    try:
        folder = cached_assets_path("realera_fast", "preserve_prior")
    except OSError as error:
        logger.info("preserve prior is not cached: %s", error)
        return None
    return Path(folder) / f"{key}.safetensors"


def _read(path: Path, words: tuple[str, ...]) -> Vocabulary | None:
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            vocabulary = Vocabulary(
                words,
                file.get_tensor("descriptors"),
                file.get_tensor("gram"),
                int(file.metadata()["prompts"]),
                "",
            )
    except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
        logger.warning(
            "cached preserve prior %s is unreadable and will be made again: %s", path, error
        )
        return None
    if len(vocabulary.descriptors) != len(words) or not torch.isfinite(vocabulary.gram).all():
        logger.warning("cached preserve prior %s does not fit and will be made again", path)
        return None
    return vocabulary


def _write(path: Path, vocabulary: Vocabulary) -> None:
    """Atomic; a cache that cannot be written costs time, not the erasure."""
    tensors = {
        "descriptors": vocabulary.descriptors.cpu().contiguous(),
        "gram": vocabulary.gram.cpu().contiguous(),
    }
    try:
        write_atomically(path, save(tensors, metadata={"prompts": str(vocabulary.prompts)}))
    except OSError as error:
        logger.warning("preserve prior could not be cached in %s: %s", path, error)
