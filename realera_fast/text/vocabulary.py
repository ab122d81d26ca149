"""What the model can say: words of the tokenizer's own vocabulary, encoded once per text encoder.

Their second moments are the *preserve prior*: what must stay where it is when no list is given
(docs/method.md, section 5).
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

from realera_fast.runtime import (
    Processes,
    check_scale,
    check_types,
    clean_names,
    folded,
    progress_bar,
    write_atomically,
)
from realera_fast.solver import NormalEquations, Pairs
from realera_fast.text.encoders import Text
from realera_fast.text.padding import first_row_weights, read_rows
from realera_fast.text.templates import fill

logger = logging.getLogger(__name__)

TEMPLATES = ("{}", "a photo of a {}", "a {} in the style of {word}")
"""Prompts of words, in turns where there are many. `{word}` is another word of the vocabulary, so
that the prior also holds compositions."""

_FEW = 500
"""So many words take the prompts in turns, fewer take all of them: of a thousand, all three for
each word hold words no better than one (ours)."""
_STRIDE = 37
_FORMAT = 2
"""Of the cache: raised where the same prompts are read in another way."""


@dataclass(frozen=True)
class VocabularyConfig:
    """The preserve prior."""

    words: int = 1000
    """Words of the tokenizer that name things, evenly from common to rare (count; docs/method.md,
    section 5; ours: so many that a CPU encodes them in minutes)."""

    preserve_scale: float | str = "auto"
    """Weight of the prior's mean row, and of each word named as preserved, against one target's
    mean row (ratio). "auto" (ours) takes what does best on the model's own words
    (`scales.choose_scales`): one number holds more or less in each text encoder."""

    exclude: tuple[str, ...] = ()
    """Words of the tokenizer that are left out: neither preserved nor mined as neighbors, unless
    they are named (default: none)."""

    cache: bool = True
    """Keep the encoded prior on disk, in the Hugging Face assets cache, under a hash of the text
    encoder's weights (default: yes)."""

    def __post_init__(self) -> None:
        check_types(self)
        object.__setattr__(self, "exclude", clean_names(self.exclude, "VocabularyConfig.exclude"))
        check_scale(self.preserve_scale, "VocabularyConfig.preserve_scale")
        if self.words < 0:
            raise ValueError(f"VocabularyConfig.words must be >= 0, got {self.words}")


@dataclass(frozen=True)
class Vocabulary:
    """Encoded words of one text encoder."""

    words: tuple[str, ...]
    gram: Tensor
    """`[d, d]` float64: second moments, summed over all prompts, mean over the rows of a prompt."""
    prompts: int
    """Number of prompts in `gram`."""
    fingerprint: str
    """Of the text that was read (`Text.fingerprint`)."""


def preserved_words(things: Sequence[str], count: int) -> tuple[str, ...]:
    """Words that stand for what a model can say: so many of those that name things, evenly."""
    return tuple(things[:: max(1, math.ceil(len(things) / count))]) if count else ()


@dataclass(frozen=True)
class _Prompt:
    """A prompt of the prior."""

    text: str
    used: frozenset[str]
    """Words that it contains."""


def _prompts(words: Sequence[str]) -> list[_Prompt]:
    """Every prompt of the prior."""
    prompts: list[_Prompt] = []
    for index, word in enumerate(words):
        other = words[(index * _STRIDE + 1) % len(words)]
        turn = index % len(TEMPLATES)
        for template in TEMPLATES if len(words) < _FEW else TEMPLATES[turn : turn + 1]:
            used = frozenset({word, other} if "{word}" in template else {word})
            prompts.append(_Prompt(fill(template, word, other), used))
    return prompts


def mean_rows(text: Text, prompts: Sequence[str]) -> Pairs:
    """Rows of prompts, to keep their place: their weights sum to 1 a prompt."""
    hidden = read_rows(text, prompts, [0.0] * len(prompts))
    weight = first_row_weights(text, prompts).to(hidden.device)
    carries = weight > 0
    rows = hidden[carries]
    return Pairs(rows, rows, weight[carries])


def prompts_at_a_time(text: Text) -> int:
    """As many as make 128 MiB of embeddings, 256 at most."""
    return max(1, min(256, (1 << 25) // (text.max_tokens * text.width)))


def _accumulate(
    text: Text,
    prompts: Sequence[_Prompt],
    *,
    progress: bool | None,
    desc: str,
    processes: Processes | None = None,
) -> Tensor:
    """Summed second moments `[d, d]`, streamed in blocks, which the processes share."""
    processes = processes or Processes()
    equations = NormalEquations(text.width, device=text.device)
    block = prompts_at_a_time(text)
    starts = range(0, len(prompts), block)
    starts = starts[processes.share(len(starts))]
    parts = [prompts[start : start + block] for start in starts]
    with progress_bar(
        total=sum(map(len, parts)), desc=desc, progress=progress if processes.is_main else False
    ) as bar:
        for part in parts:
            equations.update(mean_rows(text, [prompt.text for prompt in part]))
            bar.update(len(part))
    return processes.summed(equations.gram, text.device)


def encode_vocabulary(
    text: Text,
    config: VocabularyConfig,
    *,
    words: Sequence[str],
    progress: bool | None = False,
    processes: Processes | None = None,
) -> Vocabulary:
    """Encodes the vocabulary, or reads it from the cache.

    Args:
        words: what is encoded (`preserved_words`).
        processes: they share the work and get the same sums, to the last bit; None is this one.
    """
    processes = processes or Processes()
    left_out = {folded(word) for word in config.exclude}
    words = tuple(word for word in words if folded(word) not in left_out)
    fingerprint = text.fingerprint()
    if not words:
        gram = torch.zeros(text.width, text.width, dtype=torch.float64, device=text.device)
        return Vocabulary((), gram, 0, fingerprint)
    prompts = _prompts(words)
    path = _cache_path(text, fingerprint, prompts) if config.cache else None
    cached = None if path is None else _read(path, words)
    # Machines have caches of their own: all read, or all work.
    if processes.everywhere(cached is not None, text.device):
        assert cached is not None
        logger.info("preserve prior read from %s", path)
        return dataclasses.replace(
            cached,
            gram=cached.gram.to(text.device),
            fingerprint=fingerprint,
        )
    gram = _accumulate(text, prompts, progress=progress, desc="preserve prior", processes=processes)
    vocabulary = Vocabulary(words, gram, len(prompts), fingerprint)
    if path is not None and processes.is_main:
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
        for prompt in _prompts(vocabulary.words)
        if not dropped.isdisjoint(folded(word) for word in prompt.used)
    ]
    gram = _accumulate(text, left_out, progress=False, desc="")
    remaining = vocabulary.prompts - len(left_out)
    if remaining == 0:
        # What is left of the sums is rounding, of either sign.
        return torch.zeros_like(gram), 0
    rest = vocabulary.gram - gram
    # The rows that are taken away were read among others before, and differ by their roundings:
    # where little is left, some of its directions would be negative.
    rest.diagonal().add_(2 * torch.finfo(torch.float32).eps * float(gram.trace()))
    return rest / remaining, remaining


def _cache_path(text: Text, fingerprint: str, prompts: Sequence[_Prompt]) -> Path | None:
    from huggingface_hub import cached_assets_path

    texts = [prompt.text for prompt in prompts]
    key = hashlib.sha256(
        json.dumps([fingerprint, texts, _FORMAT, text.max_tokens, text.device.type]).encode()
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
                file.get_tensor("gram"),
                int(file.metadata()["prompts"]),
                "",
            )
    except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
        logger.warning(
            "cached preserve prior %s is unreadable and will be made again: %s", path, error
        )
        return None
    if not torch.isfinite(vocabulary.gram).all():
        logger.warning("cached preserve prior %s does not fit and will be made again", path)
        return None
    return vocabulary


def _write(path: Path, vocabulary: Vocabulary) -> None:
    """Atomic; a cache that cannot be written costs time, not the erasure."""
    tensors = {"gram": vocabulary.gram.cpu().contiguous()}
    try:
        write_atomically(path, save(tensors, metadata={"prompts": str(vocabulary.prompts)}))
    except OSError as error:
        logger.warning("preserve prior could not be cached in %s: %s", path, error)
