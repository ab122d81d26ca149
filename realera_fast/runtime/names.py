"""Texts that users give: how they are cleaned, and which names mean the same to a reader.

Whether two names are the same to a *model* is what the tokenizers of its text encoders say
(`text.name_key`); here is what holds without one.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Mapping
from typing import Any

_JOINERS = "\u200c\u200d"
_BLANK = frozenset(
    "\u034f\u115f\u1160\u3164\uffa0\u17b4\u17b5\u2800\U00013441\U00013442\U00016fe4\U0001d159"
)
"""What is drawn as nothing, though Unicode counts it as a letter, a mark or a symbol: the grapheme
joiner, the fillers of Hangul and Khitan, inherent vowels of Khmer, the empty Braille pattern, blank
hieroglyphs and the null notehead."""
_LOST = "\ufffc\ufffd"
"""What stands where an object or a character was lost."""
_FORMS = {
    range(0x180B, 0x1810): ("MONGOLIAN",),
    # Of Burmese, Phags-pa, Manichaean and hieroglyphs too; symbols are told by their category.
    range(0xFE00, 0xFE10): ("CJK", "IDEOGRAPHIC", "MYANMAR", "PHAGS", "MANICHAEAN", "EGYPTIAN"),
    range(0xE0100, 0xE01F0): ("CJK", "IDEOGRAPHIC"),
}
"""Selectors of a letter's form, with the scripts (`script`) whose letters have several."""
_KEYS = "0123456789#*"
_KEYCAP = "\u20e3"
_EMOJI = "\u203c\u2049\u2139\u3030"
"""Emoji that Unicode does not count as symbols."""
_TAGS = range(0xE0020, 0xE0080)
_FLAG = "\U0001f3f4"
_UNJOINED = frozenset(
    ["LATIN", "GREEK", "CYRILLIC", "ARMENIAN", "GEORGIAN", "HEBREW", "DIGIT", "CJK", "HIRAGANA"]
    + ["KATAKANA", "HANGUL", "THAI", "LAO", "FULLWIDTH", "HALFWIDTH", "MATHEMATICAL"]
    # The joiners themselves: one says all.
    + ["ZERO"]
)
"""First words of the Unicode names of letters that a joiner between them means nothing to."""


def valid(text: Any, what: str) -> str:
    """A string as it is, of Python's own type.

    Args:
        what: the argument's name, for errors.

    Raises:
        TypeError: not a string.
        ValueError: it holds half a character, which no tokenizer and no file takes.
    """
    if not isinstance(text, str):
        raise TypeError(f"{what} must be a string, got {type(text).__name__}")
    for place, character in enumerate(text):
        if "\ud800" <= character <= "\udfff":
            raise ValueError(
                f"{what}: {shown(text)} is not valid text: half a character, "
                f"{_named(character)}, at position {place + 1}; read it as UTF-8"
            )
    return str(text)


def clean(text: Any, what: str) -> str:
    """A name as it is kept: composed accents (NFC), one space between words, none around them.

    Characters that nobody sees are refused, as a tokenizer sees them: the name would be another one
    than it looks. Joiners stay where they mean something, as in emoji, Persian and Hindi, and so do
    selectors of a form, as in emoji and Chinese.

    Args:
        what: the argument's name, for errors.

    Raises:
        TypeError: not a string.
        ValueError: it is not valid text, or holds a character that is invisible, for control or
            format, of private use or not assigned.
    """
    text = composed(valid(text, what))
    for place, character in enumerate(text):
        before, after = text[:place][-1:], text[place + 1 : place + 2]
        if (kind := _refused(before, character, after)) is not None:
            raise ValueError(
                f"{what}: {shown(text)} holds {kind}, {_named(character)}, at position "
                f"{place + 1}; type it anew without it"
            )
    return text


def composed(text: str) -> str:
    """A text with composed accents (NFC), and single spaces between its words alone."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def folded(text: str) -> str:
    """What two spellings have in common that differ in case, accents' composition, width or space.

    For what people mean by a name; a text encoder may tell such spellings apart.
    """
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return " ".join(text.split())


def listed(values: Any, what: str, *, of: str = "a list of strings") -> tuple[Any, ...]:
    """The items of an argument that takes several, read once; None is none.

    The items of a set are sorted, as its own order differs from run to run.

    Raises:
        TypeError: one string, bytes, a mapping, or nothing that has items.
    """
    if values is None:
        return ()
    if isinstance(values, str):
        raise TypeError(f"{what}: expected {of}, got one string: write [{values!r}]")
    if isinstance(values, bytes | bytearray | memoryview | Mapping):
        raise TypeError(f"{what}: expected {of}, got {type(values).__name__}")
    try:
        items = tuple(values)
    except TypeError:
        raise TypeError(f"{what}: expected {of}, got {type(values).__name__}") from None
    return tuple(sorted(items, key=str)) if isinstance(values, set | frozenset) else items


def clean_names(values: Any, what: str) -> tuple[str, ...]:
    """Several names, cleaned (`clean`); None is none.

    Raises:
        TypeError: not several strings.
        ValueError: one is empty or not valid.
    """
    found = tuple(clean(value, what) for value in listed(values, what))
    if "" in found:
        raise ValueError(f"{what}: expected non-empty strings, got an empty one")
    return found


def valid_texts(values: Iterable[Any] | None, what: str) -> tuple[str, ...]:
    """Several strings as they are; None is none.

    Raises:
        TypeError: not several strings.
        ValueError: one is not valid text.
    """
    return tuple(valid(value, what) for value in listed(values, what))


def shown(text: str) -> str:
    """A text in quotes, cut where it is long; what can't be printed is escaped."""
    return repr(text if len(text) <= 80 else text[:80] + "...")


def script(character: str) -> str:
    """First word of a character's Unicode name: LATIN, CJK, HIRAGANA ...; "" without a name."""
    return unicodedata.name(character, "").split(" ")[0].split("-")[0] if character else ""


def _refused(before: str, character: str, after: str) -> str | None:
    """What is wrong with a character between its neighbors ("" at an end); None is nothing."""
    code, category = ord(character), unicodedata.category(character)
    if character in _LOST:
        return "a mark of lost text"
    if category in ("Co", "Cn"):
        return f"a character that has no meaning in Unicode {unicodedata.unidata_version}"
    forms = next((scripts for selectors, scripts in _FORMS.items() if code in selectors), None)
    if character in _JOINERS:
        seen = _joins(before) and _joins(after)
    elif code in _TAGS:
        seen = before == _FLAG or (before != "" and ord(before) in _TAGS)
    elif forms is not None:
        seen = script(before) in forms or (0xFE00 <= code <= 0xFE0F and _is_symbol(before, after))
    else:
        seen = character not in _BLANK and category not in ("Cf", "Cc")
    return None if seen else "a character nobody sees"


def _is_symbol(character: str, after: str) -> bool:
    """Whether a selector behind this character, and before `after`, says how a symbol is drawn."""
    if character == "" or character.isascii():
        return character != "" and character in _KEYS and after == _KEYCAP
    return character in _EMOJI or unicodedata.category(character) in ("So", "Sm")


def _joins(character: str) -> bool:
    """Whether a joiner beside this character may mean something."""
    return bool(character) and not character.isascii() and script(character) not in _UNJOINED


def _named(character: str) -> str:
    return f"U+{ord(character):04X} {unicodedata.name(character, '')}".strip()
