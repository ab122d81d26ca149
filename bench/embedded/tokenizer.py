"""A `CLIPTokenizer` that makes one token of every word of the captions."""

from __future__ import annotations

from pathlib import Path

from embedded.emoji_data import caption_words
from realera_fast.embedded import words

MAX_TOKENS = 32
SPECIAL = ("<|startoftext|>", "<|endoftext|>")


def byte_letters() -> dict[int, str]:
    """GPT-2's printable stand-in for each byte."""
    keep = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {byte: chr(byte) for byte in keep}
    for byte in range(256):
        if byte not in letters:
            letters[byte] = chr(256 + len(letters) - len(keep))
    return letters


def learn_merges(vocabulary: list[str]) -> list[tuple[str, str]]:
    """Byte-pair merges, commonest pair first, until every word is one token.

    Merging the whole list in step (instead of word by word) is what makes the merges agree: an
    early merge can never leave a later word in two pieces. A word's last letter is merged last, so
    that every token that ends a word is a word of the captions, never a fragment of one.
    """
    spelled = [[*word[:-1], word[-1] + "</w>"] for word in vocabulary]
    merges = []
    while True:
        count: dict[tuple[str, str], int] = {}
        for parts in spelled:
            for pair in zip(parts, parts[1:], strict=False):
                if len(parts) == 2 or not pair[1].endswith("</w>"):
                    count[pair] = count.get(pair, 0) + 1
        if not count:
            return merges
        best = max(count, key=lambda pair: (count[pair], pair))
        merges.append(best)
        for parts in spelled:
            i = 0
            while i < len(parts) - 1:
                if (parts[i], parts[i + 1]) == best:
                    parts[i : i + 2] = ["".join(best)]
                i += 1


def build_tokenizer(folder: Path):
    """A ``CLIPTokenizer`` with one token per caption word and bytes for everything else."""
    from transformers import CLIPTokenizer

    vocabulary = caption_words(words())
    letters = [*byte_letters().values()]
    merges = learn_merges(vocabulary)
    tokens = [*letters, *(letter + "</w>" for letter in letters)]
    tokens += ["".join(pair) for pair in merges]
    tokens = [*dict.fromkeys(tokens), *SPECIAL]
    ids = {token: i for i, token in enumerate(tokens)}
    tokenizer = CLIPTokenizer(vocab=ids, merges=merges, model_max_length=MAX_TOKENS)
    tokenizer.save_pretrained(folder)
    again = CLIPTokenizer.from_pretrained(folder)
    for word in [*vocabulary, "catalog", "Zeppelin!"]:
        ours = tokenizer(word).input_ids
        if ours != again(word).input_ids or (word in ids and len(ours) != 3):
            raise AssertionError(f"tokenizer disagrees with itself on {word!r}")
        if word in vocabulary and len(ours) != 3:
            raise AssertionError(f"{word!r} is not one token: {ours}")
    return again
