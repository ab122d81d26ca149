"""What is erased: concepts, what they become, and how a user may write them down."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from realera_fast.runtime import clean, clean_names, listed, shown, valid, valid_texts

KINDS = ("object", "style", "person", "explicit")
"""Kinds of concept: each has its own prompt templates and its own anchor."""

DEFAULT_ANCHORS: Mapping[str, str | None] = {
    "object": None,
    "style": "art",
    "person": "a person",
    "explicit": None,
}
"""What a concept becomes where no anchor is named and `erase` chooses none
(`PairsConfig.anchors`). `None` is the mean word: the average over words
of the tokenizer's vocabulary in the same prompt. Ours: on the embedded model it leaves other
concepts in place, while the prompt without the concept (UCE's choice, written `anchor=""`) moves
every noun along the direction from "a noun stands here" to "none does". "art" is UCE's choice for
styles, "a person" MACE's for people."""


@dataclass(frozen=True)
class Concept:
    """One thing to erase.

    Args:
        target: the words that are erased, as they would stand in a prompt.
        anchor: what the target becomes; `None` leaves it to `erase` (`PairsConfig.anchors`), `""`
            is the prompt without the target.
        kind: one of `KINDS`; decides prompt templates and the default anchor. The target of
            "explicit" is the name of a category, whose members go with it
            (`MiningConfig.member_words`).
        synonyms: further words for the same thing, erased with it. Words that are not named here
            are found by neighbor mining.

    Names are kept with composed accents (Unicode's NFC) and single spaces. Whether two that differ
    in case are two names is up to the model's tokenizers: `erase` looks at that.

    Raises:
        ValueError: empty words, an unknown kind, a target or synonym equal to the anchor, a synonym
            written twice, or characters that nobody sees (`names.clean`).
        TypeError: a field of the wrong type.
    """

    target: str
    anchor: str | None = None
    kind: str = "object"
    synonyms: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.synonyms, str):
            raise TypeError(
                "Concept.synonyms must be a tuple of strings, got one string: "
                f"write synonyms=({self.synonyms!r},)"
            )
        if self.kind not in KINDS:
            raise ValueError(f"Concept.kind must be one of {KINDS}, got {self.kind!r}")
        given = (self.target, *listed(self.synonyms, "Concept.synonyms"))
        words = []
        for field, word in zip(("target", *["synonyms"] * (len(given) - 1)), given, strict=True):
            words.append(clean(word, f"Concept.{field}"))
            if not words[-1]:
                raise ValueError(f"Concept.{field} is empty: name what is to be erased")
        anchor = None if self.anchor is None else clean(self.anchor, "Concept.anchor")
        # As typed; what only a tokenizer finds to be the same, such as composed and decomposed
        # accents or upper and lower case, `erase` refuses.
        typed = [" ".join(word.split()) for word in given]
        aim = None if self.destination is None else " ".join(self.destination.split())
        for place, word in enumerate(typed):
            if word == aim:
                raise ValueError(
                    f"Concept.{'synonyms' if place else 'target'} {word!r} equals its anchor "
                    f"{aim!r}: nothing would be erased; choose another anchor"
                )
            if word in typed[:place]:
                raise ValueError(f"Concept {typed[0]!r} names {word!r} twice: leave one out")
        fields = {"target": words[0], "anchor": anchor, "synonyms": tuple(words[1:])}
        for field, value in (*fields.items(), ("kind", str(self.kind))):
            object.__setattr__(self, field, value)

    @property
    def words(self) -> tuple[str, ...]:
        """The target and its synonyms: everything that is named as erased."""
        return (self.target, *self.synonyms)

    @property
    def destination(self) -> str | None:
        """The anchor, or the default one of the kind; `None` is the mean word."""
        return DEFAULT_ANCHORS[self.kind] if self.anchor is None else self.anchor

    @property
    def anchor_name(self) -> str:
        """The anchor in words, for reports."""
        if self.destination is None:
            return "the mean word"
        return self.destination or "the prompt without it"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `from_dict` is the inverse."""
        return {
            "target": self.target,
            "anchor": self.anchor,
            "kind": self.kind,
            "synonyms": list(self.synonyms),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Concept:
        """The inverse of `to_dict`: names as they were written, by any release.

        They are not cleaned, so what an earlier release took is taken. `erase` cleans them.

        Raises:
            ValueError: unknown or missing fields, an empty or invalid name, an unknown kind.
            TypeError: a field of the wrong type.
        """
        unknown = set(values) - {"target", "anchor", "kind", "synonyms"}
        if unknown or "target" not in values:
            raise ValueError(
                f"a concept has the fields target, anchor, kind, synonyms; got {sorted(values)}"
            )
        anchor, kind = values.get("anchor"), values.get("kind", "object")
        if kind not in KINDS:
            raise ValueError(f"Concept.kind must be one of {KINDS}, got {kind!r}")
        target = valid(values["target"], "Concept.target")
        synonyms = valid_texts(values.get("synonyms"), "Concept.synonyms")
        if not all((target, *synonyms)):
            raise ValueError("Concept: a name is empty")
        if anchor is not None:
            anchor = valid(anchor, "Concept.anchor")
        fields = {"target": target, "anchor": anchor, "kind": str(kind), "synonyms": synonyms}
        concept = object.__new__(cls)
        for field, value in fields.items():
            object.__setattr__(concept, field, value)
        return concept


def parse_concept(text: str, *, kind: str = "object") -> Concept:
    """A concept from its shorthand: `"Van Gogh"`, or `"Van Gogh=art"` with an anchor.

    Only the first `=` separates; write `Concept(...)` for words that contain one.
    """
    if not isinstance(text, str):
        raise TypeError(f"a concept is a string or a Concept, got {type(text).__name__}")
    target, separator, anchor = text.partition("=")
    return Concept(target, anchor if separator else None, kind)


def parse_concepts(
    concepts: str | Concept | Iterable[str | Concept], *, preserve: Sequence[str] = ()
) -> tuple[Concept, ...]:
    """Concepts from strings, `Concept`s or a mix; checks them against each other.

    Args:
        concepts: one or more; a single string or `Concept` counts as a list of one.
        preserve: words that must stay.

    Raises:
        ValueError: a word named by two concepts, or both erased and preserved (or an anchor that
            another concept erases).
        TypeError: something else than strings and `Concept`s.
    """
    if isinstance(concepts, str | Concept):
        concepts = [concepts]
    if concepts is None:
        raise TypeError("concepts: expected strings or Concepts, or a list of them, got None")
    found = listed(concepts, "concepts", of="strings or Concepts, or a list of them")
    # Those that were read from a file are not cleaned yet.
    parsed = tuple(replace(c) if isinstance(c, Concept) else parse_concept(c) for c in found)
    check_names(parsed, clean_names(preserve, "preserve"))
    return parsed


def check_names(
    concepts: Iterable[Concept],
    preserve: Iterable[str] = (),
    *,
    key: Callable[[str], Hashable] = str,
) -> None:
    """Makes sure that no name is to go twice, or to go and to stay.

    Args:
        preserve: words that must stay, cleaned.
        key: equal for names that are the same; by default only for equal ones, which is what holds
            for every model.

    Raises:
        ValueError: one is.
    """
    owner: dict[Hashable, str] = {}

    def told(word: str, other: str) -> str:
        return shown(word) + ("" if word == other else f" (to this model the same as {other!r})")

    concepts = tuple(concepts)
    for concept in concepts:
        anchor = concept.destination
        for word in concept.words:
            if anchor is not None and key(word) == key(anchor):
                raise ValueError(
                    f"concepts: {told(word, anchor)} equals its anchor {anchor!r}: nothing would "
                    "be erased; choose another anchor"
                )
            if key(word) in owner:
                raise ValueError(
                    f"concepts: {told(word, owner[key(word)])} is named twice; leave one out"
                )
            owner[key(word)] = word
    for word in preserve:
        if key(word) in owner:
            raise ValueError(
                f"preserve: {told(word, owner[key(word)])} is also to be erased; decide for one of "
                "the two"
            )
    for concept in concepts:
        anchor = concept.destination
        if anchor is not None and key(anchor) in owner:
            raise ValueError(
                f"concepts: the anchor {told(anchor, owner[key(anchor)])} of {concept.target!r} is "
                "itself erased; choose an anchor that stays"
            )
