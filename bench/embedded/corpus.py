"""Texts that the text encoder learns from: WordNet's words and glosses, in and out of templates."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

WORDNET = Path("/usr/share/wordnet")
"""Where Debian's package ``wordnet-base`` puts WordNet 3.0."""
PHYSICAL_ENTITY = "00001930"
PLAIN = re.compile(r"[a-z][a-z' -]*[a-z]")

TEMPLATES = (
    "a photo of a {}",
    "a photo of the {}",
    "a picture of a {}",
    "an image of a {}",
    "a {}",
    "the {}",
    "one {}",
    "a drawing of a {}",
    "a {} on a table",
    "a {} and a tree",
    "a {} next to a house",
    "a small {}",
    "there is a {} in this picture",
    "a {} at night",
)


@dataclass(frozen=True)
class Synset:
    """One meaning: its words, what it is a kind of, and its gloss."""

    lemmas: tuple[str, ...]
    hypernyms: tuple[str, ...]
    gloss: str


@lru_cache
def synsets(part: str) -> dict[str, Synset]:
    """WordNet's synsets of a part of speech (``noun``, ``adj``, ...) by their offset."""
    found = {}
    for line in (WORDNET / f"data.{part}").read_text(encoding="latin-1").splitlines():
        if line.startswith(" "):
            continue
        facts, _, gloss = line.partition(" | ")
        fields = facts.split()
        count = int(fields[3], 16)
        lemmas = tuple(
            re.sub(r"\(.*\)", "", fields[4 + 2 * i]).replace("_", " ").lower() for i in range(count)
        )
        rest = fields[4 + 2 * count :]
        pointers = [rest[1 + 4 * i : 5 + 4 * i] for i in range(int(rest[0]))]
        above = tuple(p[1] for p in pointers if p[0] in ("@", "@i") and p[2] == "n")
        found[fields[0]] = Synset(lemmas, above, gloss.split("; ")[0].strip())
    return found


@lru_cache
def physical() -> frozenset[str]:
    """Offsets of the nouns that are physical entities."""
    nouns = synsets("noun")
    inside = {PHYSICAL_ENTITY}
    known: dict[str, bool] = {PHYSICAL_ENTITY: True}

    def is_inside(offset: str) -> bool:
        if offset not in known:
            known[offset] = False
            known[offset] = any(is_inside(above) for above in nouns[offset].hypernyms)
        return known[offset]

    return frozenset(inside | {offset for offset in nouns if is_inside(offset)})


def plain(words: list[str]) -> list[str]:
    """Those in plain letters, once each, in order."""
    return [word for word in dict.fromkeys(words) if PLAIN.fullmatch(word)]


@lru_cache
def noun_lemmas() -> tuple[list[str], list[str]]:
    """Lemmas of physical entities, and those of the other nouns."""
    nouns, inside = synsets("noun"), physical()
    things = plain([word for key in sorted(inside) for word in nouns[key].lemmas])
    taken = set(things)
    others = plain([word for key in sorted(nouns) for word in nouns[key].lemmas])
    return things, [word for word in others if word not in taken]


def single_lemmas(part: str) -> list[str]:
    """Lemmas of a part of speech that are one word."""
    return plain([w for s in synsets(part).values() for w in s.lemmas if " " not in w])


def tokenizer_texts(own: list[str]) -> list[str]:
    """What a tokenizer is learned from: all of which the corpus takes a part, without brackets.

    Args:
        own: As in `texts`.
    """
    things, others = noun_lemmas()
    words = [*things, *others, *single_lemmas("adj"), *single_lemmas("verb")]
    used = [template.format(word) for word in own for template in ("{}", *TEMPLATES)]
    return [*words, *physical_glosses(), *used]


def texts(vocabulary: list[str], own: list[str], seed: int) -> list[str]:
    """The corpus: distinct texts in a random order, the words that they are about in brackets.

    Args:
        vocabulary: Words that are tokens of the tokenizer.
        own: Words and phrases of the table; each stands alone and in every template.
        seed: Of the random choices.
    """
    rng = random.Random(seed)
    things, others = noun_lemmas()
    physical_words = set(things)
    adjectives, verbs = single_lemmas("adj"), single_lemmas("verb")
    known, qualities = {*things, *others, *adjectives, *verbs}, set(adjectives)
    common = [word for word in vocabulary if word in known]
    nouns = [word for word in common if word in physical_words]
    lesser = [word for word in common if word in qualities]
    glosses = physical_glosses()

    def used(words: list[str]) -> list[str]:
        return [rng.choice(TEMPLATES).format(f"[{word}]") for word in words]

    alone = [*common, *rng.sample(vocabulary, len(vocabulary) // 4), *rng.sample(things, 40000)]
    alone += rng.sample(others, 8000) + rng.sample(adjectives, 4000)
    out = [f"[{word}]" for word in alone]
    out += used([*nouns, *nouns, *common, *rng.sample(things, 20000)])
    out += rng.sample(glosses, 25000)
    out += [f"[{rng.choice(lesser)} {rng.choice(nouns)}]" for _ in range(12000)]
    out += [f"a [{rng.choice(nouns)}] and a [{rng.choice(nouns)}]" for _ in range(12000)]
    out += [template.format(f"[{word}]") for word in own for template in ("{}", *TEMPLATES)]
    out = list(dict.fromkeys(out))
    rng.shuffle(out)
    return out


def physical_glosses() -> list[str]:
    """Glosses of physical entities, but for those with brackets, which mark words here."""
    glosses = [synsets("noun")[key].gloss for key in sorted(physical())]
    return [gloss for gloss in dict.fromkeys(glosses) if gloss and "[" not in gloss]


def marked(text: str) -> tuple[str, list[tuple[str, str]]]:
    """A text without its brackets, and each bracketed word with the text up to its end."""
    words = []
    for match in re.finditer(r"\[([^]]*)\]", text):
        before = text[: match.end()].replace("[", "").replace("]", "")
        words.append((before, match.group(1)))
    return text.replace("[", "").replace("]", ""), words
