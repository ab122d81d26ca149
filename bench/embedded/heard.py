"""Further words for the things of the table, as real captions have them: by WordNet, and judged by
nobody."""

from __future__ import annotations

import random
from functools import lru_cache

from embedded.corpus import WORDNET, physical, plain, synsets
from realera_fast.embedded import Thing, Words

MOST = 12
"""Words a thing."""


@lru_cache
def senses() -> dict[str, list[str]]:
    """Synsets of every noun, the most frequent first."""
    found = {}
    for line in (WORDNET / "index.noun").read_text(encoding="latin-1").splitlines():
        if not line.startswith(" "):
            fields = line.split()
            found[fields[0].replace("_", " ")] = fields[-int(fields[2]) :]
    return found


@lru_cache
def kinds() -> dict[str, list[str]]:
    """Synsets one step down."""
    found: dict[str, list[str]] = {}
    for key, synset in sorted(synsets("noun").items()):
        for above in synset.hypernyms:
            found.setdefault(above, []).append(key)
    return found


def heard_words(table: Words) -> dict[str, list[str]]:
    """Names, forms, synonyms and kinds of every thing that the table does not hold, by its name.

    What nobody said must stay so: a word of the table, or one with such a word in it, is left out.
    """
    entries = [*table.things, *table.styles]
    taken = {text for entry in entries for text in (entry.name, *entry.said, *entry.unsaid)}
    unsaid = {text for entry in entries for text in entry.unsaid}
    found: dict[str, list[str]] = {}
    owner: dict[str, str] = {}
    for thing in table.things:
        words = [w for w in plain(_of(thing)) if w not in taken and not unsaid & {*w.split()}]
        words = [word for word in words if owner.setdefault(word, thing.name) == thing.name]
        found[thing.name] = words[:MOST]
    return found


def _of(thing: Thing) -> list[str]:
    """Forms, synonyms, kinds and kinds of these, each in a random order."""
    nouns, inside, rng = synsets("noun"), physical(), random.Random(thing.name)
    own = [f"{name}s" for name in (thing.name, *thing.said) if not name.endswith("s")]
    level = [key for key in senses().get(thing.name, ()) if key in inside][:1]
    for _ in range(3):
        lemmas = [lemma for key in level for lemma in nouns[key].lemmas]
        rng.shuffle(lemmas)
        own += lemmas
        level = [key for near in level for key in kinds().get(near, ())]
    return own
