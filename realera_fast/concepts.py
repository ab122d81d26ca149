"""What is erased: concepts, what they become, and how a user may write them down."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

KINDS = ("object", "style", "person", "explicit")
"""Kinds of concept: each has its own prompt templates and its own anchor."""

DEFAULT_ANCHORS: Mapping[str, str | None] = {
    "object": None,
    "style": "art",
    "person": "a person",
    "explicit": None,
}
"""What a concept becomes when no anchor is named. `None` is the mean word: the average over words
of the tokenizer's vocabulary in the same prompt. Ours: on the embedded model it leaves other
concepts in place, while the prompt without the concept (UCE's choice, written `anchor=""`) moves
every noun along the direction from "a noun stands here" to "none does". "art" is UCE's choice for
styles, "a person" MACE's for people."""


@dataclass(frozen=True)
class Concept:
    """One thing to erase.

    Args:
        target: the words that are erased, as they would stand in a prompt.
        anchor: what the target becomes; `None` takes the default of the kind (`DEFAULT_ANCHORS`),
            `""` is the prompt without the target.
        kind: one of `KINDS`; decides prompt templates and the default anchor. The target of
            "explicit" is the name of a category, whose members go with it
            (`MiningConfig.member_words`).
        synonyms: further words for the same thing, erased with it. Words that are not named here
            are found by neighbor mining.

    Raises:
        ValueError: empty words, an unknown kind, a target or synonym equal to the anchor, or a
            synonym written twice.
        TypeError: a field of the wrong type.
    """

    target: str
    anchor: str | None = None
    kind: str = "object"
    synonyms: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.target, str):
            raise TypeError(f"Concept.target must be a string, got {type(self.target).__name__}")
        if self.anchor is not None and not isinstance(self.anchor, str):
            raise TypeError(f"Concept.anchor must be a string, got {type(self.anchor).__name__}")
        if isinstance(self.synonyms, str):
            raise TypeError(
                "Concept.synonyms must be a tuple of strings, got one string: "
                f"write synonyms=({self.synonyms!r},)"
            )
        if self.kind not in KINDS:
            raise ValueError(f"Concept.kind must be one of {KINDS}, got {self.kind!r}")
        object.__setattr__(self, "target", " ".join(self.target.split()))
        if self.anchor is not None:
            object.__setattr__(self, "anchor", " ".join(self.anchor.split()))
        object.__setattr__(self, "synonyms", tuple(" ".join(s.split()) for s in self.synonyms))
        seen: set[str] = set()
        for field, word in (("target", self.target), *(("synonyms", s) for s in self.synonyms)):
            if not word:
                raise ValueError(f"Concept.{field} is empty: name what is to be erased")
            if self.destination is not None and word.casefold() == self.destination.casefold():
                raise ValueError(
                    f"Concept.{field} {word!r} equals its anchor {self.destination!r}: "
                    "nothing would be erased; choose another anchor"
                )
            if word.casefold() in seen:
                raise ValueError(f"Concept {self.target!r} names {word!r} twice: leave one out")
            seen.add(word.casefold())

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
        """The inverse of `to_dict`.

        Raises:
            ValueError: unknown or missing fields.
        """
        unknown = set(values) - {"target", "anchor", "kind", "synonyms"}
        if unknown or "target" not in values:
            raise ValueError(
                f"a concept has the fields target, anchor, kind, synonyms; got {sorted(values)}"
            )
        return cls(**{**values, "synonyms": tuple(values.get("synonyms", ()))})


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
    """
    if isinstance(concepts, str | Concept):
        concepts = [concepts]
    if not isinstance(concepts, Iterable):
        raise TypeError(
            f"concepts: expected strings or Concepts, or a list of them, got "
            f"{type(concepts).__name__}"
        )
    parsed = tuple(c if isinstance(c, Concept) else parse_concept(c) for c in concepts)
    owner: dict[str, Concept] = {}
    for concept in parsed:
        for word in concept.words:
            if word.casefold() in owner:
                raise ValueError(f"concepts: {word!r} is named twice; leave one out")
            owner[word.casefold()] = concept
    for word in preserve:
        if not isinstance(word, str) or not word.strip():
            raise ValueError(f"preserve: expected non-empty strings, got {word!r}")
        if " ".join(word.split()).casefold() in owner:
            raise ValueError(f"preserve: {word!r} is also to be erased; decide for one of the two")
    for concept in parsed:
        if concept.destination is not None and concept.destination.casefold() in owner:
            raise ValueError(
                f"concepts: the anchor {concept.destination!r} of {concept.target!r} is itself "
                "erased; choose an anchor that stays"
            )
    return parsed
