"""What a prompt is to an erasure: which names it contains, in any script."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from realera_fast.evaluation.images import Group
from realera_fast.runtime import folded, script
from realera_fast.text import Concept

_UNSPACED = frozenset(
    ("CJK", "IDEOGRAPHIC", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR", "TAI", "NEW")
)
"""First words of the Unicode names of letters in scripts without spaces between words."""
_PARTICLES = re.compile(
    "(들)?(은|는|이|가|을|를|의|에|에서|에게|한테|께|와|과|랑|이랑|하고|도|만|로|으로|처럼|보다|까지|부터"
    "|마다|이나|나|라는|이라는|인|이다|입니다)?"
)
"""What Korean appends to a noun: the plural, then a particle."""
_HANGUL = re.compile("[가-힣]+")


def group_of(prompt: str, concepts: Sequence[Concept]) -> Group:
    """The group of a prompt: does it contain a target, a synonym, or neither?

    Names count as whole words, in any case, width or composition of accents, with any white space,
    hyphens or low lines between their words; other forms of a word, such as a plural, are other
    words. Where a script has no spaces between words (Chinese, Japanese, Thai), any place in the
    text is one.
    """
    named = names_in(prompt, concepts)
    text = _matched(prompt)
    if any(_contains(text, _matched(concept.target)) for concept in named):
        return "erased"
    return "synonym" if named else "untouched"


def names_in(prompt: str, concepts: Sequence[Concept]) -> list[Concept]:
    """The concepts that a prompt names by target or synonym: by target first."""
    text = _matched(prompt)
    by_target = [c for c in concepts if _contains(text, _matched(c.target))]
    others = [
        c
        for c in concepts
        if c not in by_target and any(_contains(text, _matched(word)) for word in c.synonyms)
    ]
    return by_target + others


def _matched(text: str) -> str:
    """A text as names are looked for in it."""
    text = re.sub(r"[\s_\-\u2010-\u2015]+", " ", folded(text))
    # Soft hyphens, marks of direction and the like; a joiner makes one emoji of two.
    dropped = {c for c in text if unicodedata.category(c) == "Cf"} - {"\u200c", "\u200d"}
    table = dict.fromkeys((*map(ord, dropped), 0xFE0E, 0xFE0F)) | {0x2019: "'"}
    return text.translate(table).strip()


def _contains(text: str, word: str) -> bool:
    """Whether a word stands in a text, both `_matched`."""
    start = text.find(word) if word else -1
    while start >= 0:
        stop = start + len(word)
        if not _is_inside(text[max(start - 1, 0) : start], word[0]):
            ending = _HANGUL.match(text, stop)
            if ending is not None and _PARTICLES.fullmatch(ending.group()):
                return True
            if not _is_inside(word[-1], text[stop : stop + 1]):
                return True
        start = text.find(word, start + 1)
    return False


def _is_inside(left: str, right: str) -> bool:
    """Whether there can't be a border of words between two neighboring characters."""
    if not (left and right):
        return False
    if "\u200d" in (left, right) or unicodedata.category(right)[0] == "M":
        return True
    if not all(unicodedata.category(c)[0] in "LMN" for c in (left, right)):
        return False
    scripts = (script(left), script(right))
    # A word of Katakana is a foreign one, and ends where the Katakana does.
    return scripts == ("KATAKANA", "KATAKANA") or not _UNSPACED.intersection(scripts)
