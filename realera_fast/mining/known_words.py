"""Every word that a model may know, where each lies, and how near is near."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from realera_fast.mining.candidates import Candidate, TokenSpace, related_words
from realera_fast.mining.line import (
    Line,
    Pairs,
    are_enough,
    calibrate,
    labelled_pairs,
    words_of,
)
from realera_fast.mining.word_space import WordSpace, read_words
from realera_fast.runtime import Processes, write_atomically
from realera_fast.text import Concept, Lexicon, Text, TokenWords, read_token_words

logger = logging.getLogger(__name__)

_SCAN = 1e12
"""Operations for which every word of a tokenizer is read (ours: about ten seconds of a CPU)."""
_SCAN_CUDA = 1e14
_TOKENS = 7
"""Of a prompt of one word."""
_FEW = 1000
"""Words that tell distances where the lexicon knows none."""
_REMEMBERED = 20_000
"""Words of several tokens, and others, whose rows are kept."""
_FORMAT = 4


@dataclass(frozen=True)
class Read:
    """What was read of one text encoder, whatever it draws for."""

    tokens: TokenWords
    things: tuple[str, ...]
    """Words of the tokenizer that name things by the lexicon, the most common first; all of them
    where the lexicon knows too few."""
    pairs: Pairs
    """Words that the lexicon relates (`line.labelled_pairs`)."""
    words: tuple[str, ...]
    """Words whose rows are known: all of the tokenizer where it is read in seconds, else those of
    the pairs."""
    rows: Tensor
    """`[w, d]` float16 row of each."""


@dataclass(frozen=True)
class KnownWords:
    """Words of one tokenizer as one model sees them."""

    text: Text
    lexicon: Lexicon
    read: Read
    space: WordSpace
    line: Line
    _fresh: dict[str, Tensor] = field(default_factory=dict, repr=False, compare=False)

    @property
    def tokens(self) -> TokenWords:
        """Plausible words of the tokenizer."""
        return self.read.tokens

    @property
    def is_scanned(self) -> bool:
        """Whether every word of the tokenizer was read."""
        return len(self.read.words) == len(self.tokens.words)

    def candidates(self, concept: Concept, most: int) -> tuple[Candidate, ...]:
        """Words that may mean a concept: what is related to it, and those that lie near, by what
        was read or else by the input embeddings; `most` of them, as far as those that are other
        forms of its names leave room."""
        if not self.is_scanned:
            return self._nearby.nearest(concept, self.lexicon, most=most)
        own = related_words(concept, self.tokens, self.lexicon)[:most]
        related = {candidate.word.casefold() for candidate in own}
        seen = self.space.seen(self.rows_of(concept.words))
        cosines = (self._units @ seen.mT.to(self._units)).amax(dim=1)
        near = cosines.topk(min(most, len(cosines))).indices.tolist()
        rest = (self.tokens.words[i] for i in near)
        return (*own, *(Candidate(w, "token", "word") for w in rest if w.casefold() not in related))

    def rows_of(self, words: Sequence[str]) -> Tensor:
        """`[n, d]` float32 rows of any words, on the CPU; those that are not known are read."""
        fresh = [w for w in dict.fromkeys(words) if w not in self.numbers and w not in self._fresh]
        if len(self._fresh) + len(fresh) > _REMEMBERED:
            self._fresh.clear()
            fresh = [w for w in dict.fromkeys(words) if w not in self.numbers]
        if fresh:
            rows = read_words(self.text, fresh).cpu().half()
            self._fresh.update(zip(fresh, rows, strict=True))
        found = [
            self.read.rows[self.numbers[w]] if w in self.numbers else self._fresh[w] for w in words
        ]
        if not found:
            return torch.zeros(0, self.text.width, dtype=torch.float32, device="cpu")
        return torch.stack(found).float()

    def line_of_unknown(self, word_cosine: float | None) -> float:
        """Least cosine of a neighbor of which nothing is known: the user's, or the model's line."""
        return self.line.unknown if word_cosine is None else word_cosine

    @functools.cached_property
    def numbers(self) -> dict[str, int]:
        """Places in `read` by word."""
        return {word: number for number, word in enumerate(self.read.words)}

    @functools.cached_property
    def names(self) -> frozenset[str]:
        """Words of the tokenizer."""
        return frozenset(self.tokens.words)

    @functools.cached_property
    def things(self) -> frozenset[str]:
        """Those that name things by the lexicon; all of them where it knows too few."""
        return frozenset(self.read.things)

    @functools.cached_property
    def _units(self) -> Tensor:
        """`[w, d]` float32: products with what `WordSpace.seen` gives are cosines, up to the length
        of the latter."""
        seen = self.space.seen(self.read.rows)
        lengths = self.space.sizes(seen).clamp_min(1e-300)
        return ((seen @ self.space.gram) / lengths[:, None]).float()

    @functools.cached_property
    def _nearby(self) -> TokenSpace:
        first = self.text.first
        return TokenSpace(self.tokens, first.token_ids, first.input_embeddings)


def read_known_words(
    text: Text,
    gram: Tensor,
    *,
    cache: bool = True,
    progress: bool | None = False,
    processes: Processes | None = None,
) -> KnownWords:
    """Reads the words of a text encoder's tokenizer, or takes them from the cache.

    Args:
        text: the encoder that finds neighbors; causal, or of few words.
        gram: `[d, d]` metric of what the model writes of its rows (`models.value_gram`).
        cache: keep the rows on disk, under a hash of the encoder's weights.
        processes: they share the words and get the same rows; None is this one.
    """
    processes = processes or Processes()
    path = _path(text) if cache else None
    found = _cached(path)
    # Another machine may have had less time.
    enough = found is not None and not (
        len(found.words) < len(found.tokens.words) and _can_scan(text, found)
    )
    # Machines have caches of their own: all take theirs, or all read.
    if not processes.everywhere(enough, text.device) or found is None:
        found = _read(text, progress, processes)
        if path is not None and processes.is_main:
            _write(path, found)
    rows = found.rows.double()
    mean = torch.zeros(text.width, dtype=torch.float64, device="cpu")
    mean = rows.mean(dim=0) if len(rows) else mean
    space = WordSpace(mean, gram.double().cpu())
    line = calibrate(space, rows, found.words, found.pairs)
    return KnownWords(text, Lexicon.load(), found, space, line)


def _read(text: Text, progress: bool | None, processes: Processes) -> Read:
    lexicon = Lexicon.load()
    tokens = read_token_words(text.first.tokenizer, lexicon)
    things = tokens.words
    if tokens.sifted:
        things = tuple(w for w in things if lexicon.has(w) and lexicon.is_physical(w))
    pairs = labelled_pairs(tokens, things, lexicon)
    nothing = torch.zeros(0, text.width, dtype=torch.float16, device="cpu")
    found = Read(tokens, things, pairs, (), nothing)
    words: Sequence[str]
    if _can_scan(text, found):
        words = tokens.words
    elif are_enough(pairs):
        words = words_of(pairs)
    else:
        words = tokens.words[:: max(1, math.ceil(len(tokens.words) / _FEW))]
    share = processes.share(len(words))
    own = read_words(text, words[share], progress=progress if processes.is_main else False)
    rows = torch.zeros(len(words), text.width, dtype=torch.float16, device="cpu")
    rows[share] = own.cpu().half()
    # To what is nought elsewhere nothing is added.
    rows = processes.summed(rows, text.device)
    return replace(found, words=tuple(words), rows=rows)


def _can_scan(text: Text, found: Read) -> bool:
    """Whether all words of the tokenizer are read in seconds."""
    tokens = _TOKENS if text.reads_unpadded else text.max_tokens
    cost = 2.0 * len(found.tokens.words) * tokens * text.parameters_per_token
    return cost <= (_SCAN_CUDA if text.device.type == "cuda" else _SCAN)


@functools.lru_cache(maxsize=1)
def _lexicon_hash() -> str:
    """Of the lexicon that is part of the package."""
    data = resources.files("realera_fast.text").joinpath("lexicon.bin").read_bytes()
    return hashlib.sha256(data).hexdigest()


def _path(text: Text) -> Path | None:
    from huggingface_hub import cached_assets_path

    known = [text.fingerprint(), _lexicon_hash(), _FORMAT, text.device.type]
    key = hashlib.sha256(json.dumps(known).encode()).hexdigest()
    try:
        return Path(cached_assets_path("realera_fast", "known_words")) / f"{key}.safetensors"
    except OSError as error:
        logger.info("known words are not cached: %s", error)
        return None


def _cached(path: Path | None) -> Read | None:
    if path is None or not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            about: Any = json.loads(file.metadata()["words"])
            rows = file.get_tensor("rows")
        tokens = about["tokens"]
        names = ("words", "ids", "known")
        found = Read(
            TokenWords(**tokens | {name: tuple(tokens[name]) for name in names}),
            tuple(about["things"]),
            {name: [tuple(pair) for pair in part] for name, part in about["pairs"].items()},
            tuple(about["words"]),
            rows,
        )
    except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
        logger.warning("cached words %s are unreadable and will be read again: %s", path, error)
        return None
    if len(rows) != len(found.words) or not torch.isfinite(rows).all():
        logger.warning("cached words %s do not fit and will be read again", path)
        return None
    return found


def _write(path: Path, found: Read) -> None:
    """Atomic; a cache that cannot be written costs time, not the erasure."""
    about = {
        "tokens": asdict(found.tokens),
        "things": found.things,
        "pairs": found.pairs,
        "words": found.words,
    }
    try:
        data = save({"rows": found.rows.contiguous()}, {"words": json.dumps(about)})
        write_atomically(path, data)
    except OSError as error:
        logger.warning("known words could not be cached in %s: %s", path, error)
