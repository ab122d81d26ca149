"""The tokenizer: CLIP's byte-pair vocabulary of 49,408 tokens, or a learned one; 77 rows."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

MAX_TOKENS = 77
MERGES = 48894
SPECIAL = ("<|startoftext|>", "<|endoftext|>")


def byte_letters() -> dict[int, str]:
    """GPT-2's printable stand-in for each byte."""
    keep = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {byte: chr(byte) for byte in keep}
    for byte in range(256):
        if byte not in letters:
            letters[byte] = chr(256 + len(letters) - len(keep))
    return letters


def read_merges() -> list[tuple[str, str]]:
    """The merges of CLIP, from the file that the package ``open_clip_torch`` carries (MIT)."""
    spec = find_spec("open_clip")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("open_clip: pip install --no-deps open_clip_torch")
    file = Path(spec.origin).parent / "bpe_simple_vocab_16e6.txt.gz"
    lines = gzip.decompress(file.read_bytes()).decode("utf-8").split("\n")
    return [(a, b) for a, b in (line.split() for line in lines[1 : MERGES + 1])]


def first_tokens() -> list[str]:
    """Every byte inside of a word, then at its end."""
    letters = [*byte_letters().values()]
    return [*letters, *(letter + "</w>" for letter in letters)]


def clip_tokenizer(merges: list[tuple[str, str]]):
    """A ``CLIPTokenizer``: bytes first, start and end last."""
    from transformers import CLIPTokenizer

    # Two merges of a learned vocabulary may make one token.
    tokens = dict.fromkeys([*first_tokens(), *("".join(pair) for pair in merges), *SPECIAL])
    ids = {token: i for i, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=ids, merges=merges, model_max_length=MAX_TOKENS)


def learned_merges(texts: Iterable[str], tokens: int) -> list[tuple[str, str]]:
    """The merges of a vocabulary of so many tokens (fewer, if the texts hold no more)."""
    from tokenizers.trainers import BpeTrainer

    learner = clip_tokenizer([]).backend_tokenizer
    # Tokens that are known before have one order; found in the texts, they would have any, and the
    # order decides between merges of equal count.
    trainer = BpeTrainer(
        vocab_size=tokens - len(SPECIAL),
        special_tokens=first_tokens(),
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    learner.train_from_iterator(texts, trainer)
    return [(a, b) for a, b in json.loads(learner.to_str())["model"]["merges"]]


def build_tokenizer(folder: Path, merges: list[tuple[str, str]]):
    """A ``CLIPTokenizer`` of these merges, written to ``folder``."""
    from transformers import CLIPTokenizer

    clip_tokenizer(merges).save_pretrained(folder)
    return CLIPTokenizer.from_pretrained(folder)


def vocabulary(tokenizer) -> list[str]:
    """Tokens that end a word and are plain letters, two or more, in the order of their rank."""
    ranked = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    words = [token.removesuffix("</w>") for token, _ in ranked if token.endswith("</w>")]
    return [word for word in words if len(word) > 1 and word.isascii() and word.isalpha()]
