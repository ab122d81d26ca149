"""Words among the tokens of a text encoder: whole words, names and handles, and no word endings.

Half of the tokens that end a word in CLIP's byte-pair vocabulary are no words. Some of these are
names and handles that people ask for (`vangogh`, `realdonaldtrump`), others are ends of words that
are no token themselves (`tion`, `ments`). What the lexicon doesn't know is told by the tokenizer:
an ending is what it cuts off the lexicon's rarer words again and again, a name is not.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Container, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from realera_fast.text.lexicon import Lexicon

Known = Literal["lemma", "inflection", "name"]

_BEGINS = ("\u2581", "\u0120")
"""Marks at the beginning of a word: SentencePiece's, and that of byte-level byte-pair encoding."""
_END = "</w>"

_SHORTEST = 3
"""Letters of a word of an alphabet; shorter tokens are abbreviations and pieces."""
_CUTS = 1
"""A name may be cut off that many plain words of the lexicon (ours: three of four of CLIP's unknown
tokens are cut off none, all endings that we listed off more, or off more of all words)."""
_CUTS_PART = 3
"""The same for a part of a name that the lexicon has: Nathan, of Nathan Hale."""
_CUTS_ALL = 3
"""A name may be cut off that many of all words, names too: "ville" off places alone."""
_FEWEST = 2000
"""A smaller vocabulary is a list of words; its rest is single letters."""
_LEAST_KNOWN = 0.3
"""Share of a vocabulary that the lexicon must know to tell words from endings. Of CLIP's it knows
two thirds, of a German or French one a tenth."""

# What is cut off an unknown token, and put there, to find the ending that it is a form of.
_FORMS = (
    ("ies", ("y", "ie")),
    ("es", ("", "e")),
    ("s", ("",)),
    ("ied", ("y",)),
    ("ed", ("", "e")),
    ("ing", ("", "e")),
    ("ers", ("", "e", "er")),
    ("er", ("", "e")),
    ("ly", ("",)),
    ("ically", ("ic",)),
    ("ness", ("",)),
)


@dataclass(frozen=True)
class TokenWords:
    """Plausible words of a tokenizer, each a token of its own, the most common first."""

    words: tuple[str, ...]
    ids: tuple[int, ...]
    """Numbers of their tokens."""
    known: tuple[Known, ...]
    """What the lexicon says: a word of its own, an inflection of one, or nothing: a name, a handle,
    or a word of another language."""
    known_share: float
    """Of all tokens that are whole words by their mark, those that the lexicon knows (ratio)."""
    sifted: bool
    """Whether endings were told from words; not where the lexicon knows too few."""


def whole_words(tokenizer: Any) -> dict[str, int]:
    """Tokens that are whole words by their mark, with their numbers, the most common first.

    CLIP's byte-pair vocabulary marks a token that ends a word with `</w>`, SentencePiece's one that
    begins a word with a low line, byte-level byte-pair encoding with `\u0120`; all number them by
    frequency. Other tokenizers have no such mark and give no words.

    Args:
        tokenizer: a transformers tokenizer.
    """
    found: dict[str, int] = {}
    for token, number in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]):
        if token.endswith(_END):
            word = token.removesuffix(_END)
        elif token.startswith(_BEGINS):
            word = token[1:]
        else:
            continue
        if not word.isascii():
            # Bytes of other letters stand for themselves in a byte-level vocabulary.
            word = _decoded(tokenizer, token)
        if _is_word(word):
            found.setdefault(word, number)
    return found


def read_token_words(tokenizer: Any, lexicon: Lexicon) -> TokenWords:
    """The plausible words of a tokenizer; about two seconds for CLIP's.

    Args:
        tokenizer: a transformers tokenizer.
    """
    whole = whole_words(tokenizer)
    known: dict[str, Known] = {}
    for word in whole:
        if lexicon.has(word):
            known[word] = "lemma"
        elif lexicon.knows(word):
            known[word] = "inflection"
        else:
            known[word] = "name"
    share = sum(kind != "name" for kind in known.values()) / max(1, len(known))
    sifted = len(whole) >= _FEWEST and share >= _LEAST_KNOWN
    if sifted:
        cuts = _cuts(tokenizer, whole, lexicon)
        parts = _parts(lexicon)
        known = {w: kind for w, kind in known.items() if _plausible(w, kind, cuts, parts, lexicon)}
    words = tuple(known)
    return TokenWords(
        words, tuple(whole[word] for word in words), tuple(known.values()), share, sifted
    )


def _decoded(tokenizer: Any, token: str) -> str:
    return str(tokenizer.convert_tokens_to_string([token])).removesuffix(_END).strip()


def _is_word(word: str) -> bool:
    """Whether a token's text is letters alone, or symbols such as an emoji."""
    if "\N{REPLACEMENT CHARACTER}" in word:
        return False
    categories = [unicodedata.category(c) for c in word]
    if any(category[0] == "L" for category in categories):
        cased = word.lower() != word.upper()
        letters = all(category[0] in "LM" for category in categories)
        return letters and (len(word) >= _SHORTEST or not cased)
    return "So" in categories[:1] and not any(c.isascii() for c in word)


@dataclass(frozen=True)
class _Cuts:
    """How many words of the lexicon are cut so that a piece of them is left, by piece."""

    plain: Counter[str]
    every: Counter[str]
    """Names counted too: they are of all languages, and so are the words that they would end."""


def _cuts(tokenizer: Any, whole: Container[str], lexicon: Lexicon) -> _Cuts:
    """What the tokenizer cuts off the end of words, or off their beginning where its mark is there.

    Two known words that are written as one (`houseboat`) don't count.
    """
    vocabulary = tokenizer.get_vocab()
    at_end = any(token.endswith(_END) for token in vocabulary)
    names = {number: token for token, number in vocabulary.items()}
    single = (w for w in lexicon.words if w.isascii() and w.isalpha())
    rare = [word for word in single if word.lower() not in whole]
    texts = rare if at_end else [f" {word}" for word in rare]
    cuts = _Cuts(Counter(), Counter())
    pieces = tokenizer(texts, add_special_tokens=False, verbose=False).input_ids
    for word, numbers in zip(rare, pieces, strict=True):
        if len(numbers) < 2:
            continue
        if at_end:
            piece = names[numbers[-1]].removesuffix(_END)
            rest = word[: -len(piece)]
        else:
            piece = names[numbers[0]].removeprefix(_BEGINS[0]).removeprefix(_BEGINS[1])
            rest = word[len(piece) :]
        if lexicon.has(rest) and lexicon.has(piece):
            continue
        cuts.every[piece] += 1
        cuts.plain[piece] += word.islower()
    return cuts


def _parts(lexicon: Lexicon) -> set[str]:
    """Parts of names of several words, in lower case."""
    names = (word for word in lexicon.words if " " in word and not word.islower())
    return {part.lower() for name in names for part in name.split() if part.istitle()}


def _plausible(word: str, kind: Known, cuts: _Cuts, parts: set[str], lexicon: Lexicon) -> bool:
    if kind == "inflection":
        # "ates" is no plural of the goddess Ate, nor "its" of IT.
        bases = [base for base in lexicon.lemmas(word) if len(base) >= _SHORTEST]
        return any(
            lexicon.uses(base) or max(cuts.plain[word], cuts.plain[base.lower()]) <= _CUTS
            for base in bases
        )
    if kind == "lemma" and word in {base.lower() for base in lexicon.lemmas(word)}:
        return True
    # A name, or words run together: "vangogh", but "ching" is no way to write Ch'ing.
    endings = (word, *(base for base in _stripped(word) if not lexicon.has(base)))
    most = _CUTS_PART if word in parts else _CUTS
    return all(cuts.plain[e] <= most and cuts.every[e] <= _CUTS_ALL for e in endings)


def _stripped(word: str) -> Iterator[str]:
    for ending, ends in _FORMS:
        if word.endswith(ending):
            yield from (f"{word.removesuffix(ending)}{end}" for end in ends if word != ending)
