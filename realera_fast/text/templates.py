"""Prompts that a word is put into."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from realera_fast.runtime import check_scale, check_types, clean, valid_texts

TEMPLATES: Mapping[str, tuple[str, ...]] = {
    "object": (
        "{}",
        "a {}",
        "a photo of a {}",
        "a picture of a {}",
        "a photo of the {}",
        "a drawing of a {}",
        "an image of a {}",
        "a {} next to a {word}",
    ),
    "style": (
        "{}",
        "{} style",
        "a picture in the style of {}",
        "a {word} in the style of {}",
        "a {} picture of a {word}",
        "a {} style {word}",
    ),
    "person": (
        "{}",
        "a photo of {}",
        "a portrait of {}",
        "a picture of {}",
        "an image of {}",
        "a photo of {} with a {word}",
    ),
    "explicit": ("{}", "a photo of {}", "a picture of {}", "an image of {}", "{} and {word}"),
}
"""Prompt templates by kind. `{}` is the concept; `{word}` is filled with words of the tokenizer."""


@dataclass(frozen=True)
class PairsConfig:
    """How concepts are put into prompts."""

    templates: Mapping[str, tuple[str, ...]] | None = None
    """Templates by kind, each with one `{}`; kinds left out keep theirs. Default: `TEMPLATES`
    (ours; MACE uses 30 templates a kind, UCE the bare phrase)."""

    context_words: int = 32
    """Words of the tokenizer's vocabulary put into each `{word}` template (count; ours)."""

    anchors: str = "auto"
    """What concepts become that name no anchor. "auto" (ours): an object a near but distinct thing
    that the model can draw, a person a merge of people, a style the plain medium
    (`mining.choose_anchors`); "mean", and where there is none: the default of the kind
    (`text.concepts.DEFAULT_ANCHORS`), of objects the mean word."""

    neutral_words: int = 32
    """Words whose average is the mean word, the anchor of concepts without one (count; ours)."""

    negative_guidance: float | str = "auto"
    """g of a named word's destination a - g (e - a): past the anchor, away from the concept e, so
    that words which nobody names and no vocabulary lists go as well (ratio; ours, ESD's idea, arXiv
    2303.07345, in the closed form). 0 stops at the anchor, as the papers have it and as mined words
    do, which are many and would push the rest away. "auto" (ours) takes what does best on the
    model's own words (`scales.choose_scales`), and 0 where noise is mined."""

    def __post_init__(self) -> None:
        check_types(self)
        check_scale(self.negative_guidance, "PairsConfig.negative_guidance")
        if self.anchors not in ("auto", "mean"):
            raise ValueError(f'PairsConfig.anchors must be "auto" or "mean", got {self.anchors!r}')
        for name in ("context_words", "neutral_words"):
            if getattr(self, name) < 0:
                raise ValueError(f"PairsConfig.{name} must be >= 0, got {getattr(self, name)}")
        if self.templates is None:
            return
        if not isinstance(self.templates, Mapping):
            raise TypeError(
                "PairsConfig.templates must be a mapping of kinds to templates, got "
                f"{type(self.templates).__name__}"
            )
        templates = {}
        for kind, given in self.templates.items():
            if kind not in TEMPLATES:
                raise ValueError(f"templates: unknown kind {kind!r}; expected {tuple(TEMPLATES)}")
            some = () if isinstance(given, str) else valid_texts(given, f"templates[{kind!r}]")
            if not some:
                raise ValueError(f"templates[{kind!r}] must be a non-empty tuple of strings")
            templates[kind] = some
            for template in some:
                clean(template, f"templates[{kind!r}]")
                if template.count("{}") != 1:
                    raise ValueError(f"templates[{kind!r}]: {template!r} needs exactly one {{}}")
        object.__setattr__(self, "templates", templates)

    def of(self, kind: str) -> tuple[str, ...]:
        """The templates of one kind."""
        return tuple((self.templates or {}).get(kind, TEMPLATES[kind]))


def fill(template: str, word: str, context: str = "") -> str:
    """A prompt; an empty word leaves no double space behind."""
    return " ".join(template.replace("{word}", context).replace("{}", word).split())


def before_word(template: str, context: str = "") -> str:
    """What stands in front of the word in a filled template."""
    text = template.split("{}")[0].replace("{word}", context)
    return " ".join(text.split()) + (" " if text.endswith(" ") else "")


def prompts_of(
    word: str, templates: Sequence[str], context: Sequence[str] = ()
) -> tuple[tuple[str, str, str], ...]:
    """`(prompt, template, context word)` for every template and, where it has one, context word."""
    return tuple(
        (fill(template, word, extra), template, extra)
        for template in templates
        for extra in (context if "{word}" in template else ("",))
    )
