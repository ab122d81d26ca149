"""A lexicon of English nouns and adjectives: WordNet 3.0 (Miller 1995)."""

from __future__ import annotations

import functools
import itertools
import string
import unicodedata
from array import array
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

from realera_fast.text.lexicon_file import LexiconFile

NOUN, ADJECTIVE, VERB, ADVERB = 1, 2, 4, 8
"""Bits of what a word is used as."""

_LEXICOGRAPHERS = (
    *("adjective", "pertainym", "adverb", "top", "act", "animal", "artifact", "attribute"),
    *("body", "cognition", "communication", "event", "feeling", "food", "group", "location"),
    *("motive", "object", "person", "phenomenon", "plant", "possession", "process", "quantity"),
    *("relation", "shape", "state", "substance", "time"),
)
"""Names of WordNet's lexicographer files by number (lexnames(5WN)), those of nouns and adjectives;
a participle used as an adjective has number 44."""
_PERSON = 18
_PHYSICAL = "physical entity"
_COMPARABLE = 4
"""A meaning counts beside the most frequent one from a quarter of its tags on (ours)."""
_UNTAGGED = 2
"""So many meanings count where none is tagged (ours): a bike is a motorcycle and a bicycle."""

# What is cut off the end and what is put there, by what the word then is (morphy(7WN)).
_ENDINGS = (
    (NOUN, "s", ""),
    (NOUN, "ses", "s"),
    (NOUN, "xes", "x"),
    (NOUN, "zes", "z"),
    (NOUN, "ches", "ch"),
    (NOUN, "shes", "sh"),
    (NOUN, "men", "man"),
    (NOUN, "ies", "y"),
    (VERB, "s", ""),
    (VERB, "ies", "y"),
    (VERB, "es", "e"),
    (VERB, "es", ""),
    (VERB, "ed", "e"),
    (VERB, "ed", ""),
    (VERB, "ing", "e"),
    (VERB, "ing", ""),
    (ADJECTIVE, "er", ""),
    (ADJECTIVE, "est", ""),
    (ADJECTIVE, "er", "e"),
    (ADJECTIVE, "est", "e"),
)
_MARKS = str.maketrans("", "", string.punctuation.replace("+", "").replace("$", "") + " ")
_ACCENTS = 200
"""From this combining class on a mark is an accent; below it makes another letter (Japanese)."""


def run_together(text: str) -> str:
    """A name without case, accents, spaces, hyphens and apostrophes: `"van Gogh"` is `"vangogh"`.

    Equal for the ways in which people write and join one name.
    """
    if text.isascii():
        return text.lower().translate(_MARKS)
    parts = unicodedata.normalize("NFKD", unicodedata.normalize("NFKC", text).casefold())
    kept = (
        c
        for c in parts
        if unicodedata.combining(c) < _ACCENTS and unicodedata.category(c)[0] not in "PZ"
    )
    return unicodedata.normalize("NFC", "".join(kept)).translate(_MARKS)


def _plain(text: str) -> str:
    return " ".join(text.casefold().replace("-", " ").split())


def _owner(word: str) -> str:
    """What stands before a possessive's ending; "" where there is none."""
    ending = next((e for e in ("'s", "\N{RIGHT SINGLE QUOTATION MARK}s") if word.endswith(e)), None)
    return word.removesuffix(ending) if ending else ""


class Lexicon:
    """Words, their meanings and how these are related; made by `Lexicon.load`.

    A word is found however it is written: in capitals, with accents, run together, with hyphens, in
    the plural. Unknown words have no relations. Lists of words are without the word itself, as
    WordNet writes them, the most frequent or nearest first.

    `kind` is a concept's kind: "object" means things that can be seen and beings, those of tales
    too, or all nouns where there is none; "person" and "style" people, and "style" all nouns where
    there is none; "explicit" nouns and adjectives. The most frequent meaning counts, and others
    tagged a quarter as often; where none is, two, of "object" things before people.
    """

    def __init__(self, file: LexiconFile) -> None:
        self._file = file
        text = file.text("words")
        self.words: list[str] = text.split("\n")
        """All words as WordNet writes them, sorted by `run_together`."""
        self._keys = text.lower().translate(_MARKS).split("\n")
        # The first place of a key comes last, so it stays.
        last = len(self._keys) - 1
        self._place = {key: last - place for place, key in enumerate(reversed(self._keys))}

    @classmethod
    @functools.lru_cache(maxsize=1)
    def load(cls) -> Lexicon:
        """The lexicon that is part of the package, read once a process.

        Raises:
            RuntimeError: the file is of another release of the package.
        """
        return cls(LexiconFile.read())

    # Words

    def entries(self, word: str) -> list[int]:
        """Places in `words` of a word as it is, without regard to inflections.

        Those that are written the same come first, then those that differ in case; where there are
        none, those that are the same when they are run together.
        """
        key = run_together(word)
        start, found = self._place.get(key), []
        if start is None or not key:
            return []
        for place in range(start, len(self._keys)):
            if self._keys[place] != key:
                break
            found.append(place)
        spelled = [place for place in found if _plain(self.words[place]) == _plain(word)]
        return sorted(spelled or found, key=lambda place: self.words[place] != word)

    def lemmas(self, word: str) -> tuple[str, ...]:
        """Words of the lexicon that a word is, or is an inflection of: "knives" gives "knife"."""
        own = [self.words[place] for place in self.entries(word)]
        return tuple(dict.fromkeys((*own, *self._bases(word))))

    def knows(self, word: str) -> bool:
        """Whether a word, or what it is an inflection of, is in the lexicon."""
        return run_together(word) in self._place or next(self._bases(word), None) is not None

    def has(self, word: str) -> bool:
        """Whether a word is in the lexicon as it is, uninflected."""
        return run_together(word) in self._place

    def is_common(self, word: str) -> bool:
        """Whether a word, or what it is an inflection of, is written without a capital."""
        return any(lemma.islower() for lemma in self.lemmas(word))

    def uses(self, word: str) -> int:
        """How often a word was tagged in WordNet's texts (count), as any part of speech."""
        others, tags = self._file.numbers("others"), self._file.numbers("senses.tags")
        return sum(
            others[place] + sum(tags[start] for start in self._file.range("senses", place))
            for place in self.entries(word)
        )

    def inflections(self, word: str) -> tuple[str, ...]:
        """Singular or plural, and the possessive, of a word or of the last of several words.

        Adjectives and words of other scripts have none. A word that the lexicon doesn't know is
        taken as a noun's singular.
        """
        head, space, last = word.rpartition(" ")
        if not run_together(last).isascii() or not run_together(last[-1:]).isalpha():
            return ()
        if owner := _owner(last):
            return (f"{head}{space}{owner}",)
        parts = [self._file.numbers("parts")[place] for place in self.entries(last)]
        if parts and not any(part & NOUN for part in parts):
            return ()
        singular = next((b for b in self._bases(last, NOUN) if not self.has(last)), None)
        forms = [singular] if singular else self._plurals(last)
        possessive = f"{last}'" if last.endswith(("s", "S")) and singular else f"{last}'s"
        return tuple(f"{head}{space}{form}" for form in (*forms, possessive))

    # Meanings

    def kinds(self, word: str) -> tuple[str, ...]:
        """What a word may be, the most frequent first: "animal", "artifact", "person", "plant" ...

        Names of WordNet's lexicographer files.
        """
        numbers = (self._files[synset] for synset in self._senses(word, None))
        names = (_LEXICOGRAPHERS[n] if n < len(_LEXICOGRAPHERS) else "adjective" for n in numbers)
        return tuple(dict.fromkeys(names))

    def is_physical(self, word: str) -> bool:
        """Whether the most frequent meaning of a word is a thing that can be seen, or a person."""
        found = self._senses(word, None)
        return bool(found) and self._is_physical(found[0])

    def synonyms(self, word: str, kind: str = "object") -> tuple[str, ...]:
        """Other words for the same thing; of "explicit" ones also the adjectives beside a noun."""
        synsets = self.senses(word, kind)
        if kind == "explicit":
            relations = ("adjectives", "similar")
            beside = [t for s in synsets for r in relations for t in self._file.targets(r, s)]
            synsets = (*synsets, *dict.fromkeys(beside))
        return self._named(synsets, word)

    def homonyms(self, word: str, kind: str = "object") -> tuple[str, ...]:
        """Other words for what else a word may mean: "ace" for wizard."""
        meant = self.senses(word, kind)
        return self._named((s for s in self._senses(word, NOUN) if s not in meant), word)

    def hyponyms(
        self,
        word: str,
        depth: int = 3,
        *,
        kind: str = "object",
        usual: bool = True,
        most: int = 500,
    ) -> tuple[str, ...]:
        """Kinds and instances of a thing: "tabby" for cat; those of few steps down first.

        Args:
            depth: steps down.
            usual: those whose usual meaning it is, or others: an old "bus" for car. Of a word
                without a usual meaning ("cob" for swan) every one counts.
            most: words at most.
        """
        below = dict.fromkeys(self._below(self.senses(word, kind), depth))

        def is_usual(name: str) -> bool:
            every = self._senses(name, NOUN)
            return not below.keys().isdisjoint(self.senses(name, kind)) or not any(
                self._tags_of(name, synset) for synset in every
            )

        found = (name for name in self._named(below, word) if is_usual(name) == usual)
        return tuple(itertools.islice(found, most))

    def compounds(self, word: str, depth: int = 3, *, kind: str = "object") -> tuple[str, ...]:
        """Names that end with a word, of kinds of what it is a kind of: "sailing ship" for ship."""
        near, last = self._below(self._above(self.senses(word, kind)), depth), f" {_plain(word)}"
        return tuple(w for w in self._named(near, word) if _plain(w).endswith(last))

    def hypernyms(self, word: str, *, kind: str = "object") -> tuple[str, ...]:
        """What a thing is a kind or an instance of, one step up: "feline" for cat."""
        return self._named(self._above(self.senses(word, kind)), word)

    def siblings(
        self, word: str, height: int = 1, *, kind: str = "object", most: int = 100
    ) -> tuple[str, ...]:
        """Other kinds of what a thing is a kind of: "truck" for car. Relatives that should stay.

        Neither the thing's own kinds nor what it is a kind of are among them. Those of a single
        being ("Picasso") are single beings.

        Args:
            height: steps up, and as many down again; of equal height the most frequent first.
            most: words at most.
        """
        own = self.senses(word, kind)
        taken = {*own, *self._below(own, depth=16), *self._ancestors(own)}
        mine = {run_together(word), *map(run_together, self._named(own, word))}
        single = any(self._file.range("instance_of", s) for s in own)
        found: list[int] = []
        above = list(own)
        for step in range(1, height + 1):
            above = self._above(above)
            near = [
                s
                for s in self._below(above, step)
                if s not in taken and bool(self._file.range("instance_of", s)) >= single
            ]
            found += sorted(near, key=self._tags.__getitem__, reverse=True)
        words = self._named(dict.fromkeys(found), word)
        return tuple(w for w in words if run_together(w) not in mine)[:most]

    def senses(self, word: str, kind: str = "object") -> tuple[int, ...]:
        """Numbers of the meanings that are meant by a word of a concept's kind; see the class."""
        nouns = self._senses(word, NOUN)
        if kind == "explicit":
            beside = [s for s in self._senses(word, None) if s not in nouns]
            return self._frequent(word, nouns) + self._frequent(word, beside)
        for some in (self._senses(word, NOUN, as_written=True), nouns):
            if kind == "object":
                meant = [s for s in some if self._is_physical(s) or self._files[s] == _PERSON]
                if meant and not self._tags_of(word, meant[0]):
                    meant.sort(key=lambda synset: self._files[synset] == _PERSON)
            else:
                meant = [s for s in some if self._files[s] == _PERSON]
            if meant:
                return self._frequent(word, meant)
        return () if kind == "person" else self._frequent(word, nouns)

    # Inside: words

    def _bases(self, word: str, part: int = NOUN | ADJECTIVE | VERB) -> Iterator[str]:
        """Words of the lexicon that a word is an inflection of."""
        plain = word.casefold()
        if owner := _owner(plain):
            plain = owner
            yield from (self.words[place] for place in self.entries(owner))
        for bit, exceptions in self._exceptions.items():
            if bit & part:
                yield from (base for base in exceptions.get(plain, ()) if self.has(base))
        parts = self._file.numbers("parts")
        for bit, ending, end in _ENDINGS:
            if bit & part and plain.endswith(ending) and len(plain) > len(ending) + 1:
                for place in self.entries(plain.removesuffix(ending) + end):
                    if parts[place] & bit:
                        yield self.words[place]

    def _plurals(self, word: str) -> list[str]:
        irregular = self._irregular.get(word.casefold())
        if irregular:
            return irregular
        if word.endswith(("s", "x", "z", "ch", "sh")):
            return [f"{word}es"]
        if word.endswith("y") and word[-2:-1].lower() not in tuple("aeiou"):
            return [f"{word[:-1]}ies", f"{word}s"] if word.istitle() else [f"{word[:-1]}ies"]
        return [f"{word}s"]

    @functools.cached_property
    def _exceptions(self) -> dict[int, dict[str, list[str]]]:
        found: dict[int, dict[str, list[str]]] = {}
        for bit, part in ((NOUN, "noun"), (ADJECTIVE, "adj"), (VERB, "verb")):
            table = found[bit] = defaultdict(list)
            for line in self._file.text(f"{part}.exceptions").split("\n"):
                form, base = line.split(" ")
                table[form.replace("_", " ")].append(base.replace("_", " "))
            table.default_factory = None
        return found

    @functools.cached_property
    def _irregular(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for form, bases in self._exceptions[NOUN].items():
            for base in bases:
                found.setdefault(base, []).append(form)
        return found

    def _named(self, synsets: Iterable[int], word: str) -> tuple[str, ...]:
        """Words of meanings, once each, without the word itself."""
        own = _plain(word)
        found = {
            self.words[self._file.numbers("members")[place]]: None
            for synset in synsets
            for place in self._file.range("members", synset)
        }
        return tuple(w for w in found if _plain(w) != own)

    # Inside: meanings

    def _senses(self, word: str, part: int | None, *, as_written: bool = False) -> list[int]:
        """Meanings of a word, or where it has none of what it is an inflection of.

        Args:
            as_written: of the word in the same case alone: a sombrero is no island, Sombrero.
        """
        for words in ((word,), self._bases(word, part or NOUN | ADJECTIVE)):
            found = [
                self._file.numbers("senses")[place]
                for base in words
                for entry in self.entries(base)
                if not as_written or self.words[entry] == base
                for place in self._file.range("senses", entry)
            ]
            nouns = [s for s in found if 3 <= self._files[s] < len(_LEXICOGRAPHERS)]
            chosen = nouns if part == NOUN else found
            if chosen:
                return list(dict.fromkeys(chosen))
        return []

    def _tags_of(self, word: str, synset: int) -> int:
        """How often a word was tagged with a meaning."""
        senses, tags = self._file.numbers("senses"), self._file.numbers("senses.tags")
        return sum(
            tags[place]
            for lemma in self.lemmas(word)
            for entry in self.entries(lemma)
            for place in self._file.range("senses", entry)
            if senses[place] == synset
        )

    def _frequent(self, word: str, synsets: list[int]) -> tuple[int, ...]:
        """Of meanings in their order the first, and those that are as usual; see the class."""
        tags = [self._tags_of(word, synset) for synset in synsets]
        if not any(tags[:1]):
            return tuple(synsets[:_UNTAGGED])
        return tuple(s for s, n in zip(synsets, tags, strict=True) if n * _COMPARABLE >= tags[0])

    @functools.cached_property
    def _files(self) -> array[int]:
        return self._file.numbers("files")

    @functools.cached_property
    def _tags(self) -> array[int]:
        """How often any word was tagged with each meaning."""
        total = array("I", bytes(4 * len(self._files)))
        for synset, tags in zip(
            self._file.numbers("senses"), self._file.numbers("senses.tags"), strict=True
        ):
            total[synset] += tags
        return total

    def _above(self, synsets: Iterable[int]) -> list[int]:
        found = (
            target
            for synset in synsets
            for relation in ("hypernyms", "instance_of")
            for target in self._file.targets(relation, synset)
        )
        return list(dict.fromkeys(found))

    def _ancestors(self, synsets: Iterable[int]) -> dict[int, None]:
        found: dict[int, None] = {}
        level = list(synsets)
        while level := [s for s in self._above(level) if s not in found]:
            found |= dict.fromkeys(level)
        return found

    def _below(self, synsets: Sequence[int], depth: int) -> list[int]:
        """Meanings up to `depth` steps down, level by level, the most frequent of each first."""
        found: dict[int, None] = {}
        level, seen = list(synsets), set(synsets)
        for _ in range(depth):
            below = list(dict.fromkeys(t for s in level for t in self._kinds_of.get(s, ())))
            below = [s for s in below if s not in seen]
            level = sorted(below, key=self._tags.__getitem__, reverse=True)
            if not level:
                break
            seen.update(level)
            found |= dict.fromkeys(level)
        return list(found)

    @functools.cached_property
    def _kinds_of(self) -> dict[int, list[int]]:
        found: dict[int, list[int]] = defaultdict(list)
        for relation in ("hypernyms", "instance_of"):
            for synset, target in self._file.links(relation):
                found[target].append(synset)
        return dict(found)

    @functools.cached_property
    def _physical(self) -> frozenset[int]:
        """Meanings of what has a body, however far down."""
        (first, *_) = self._file.range("senses", self.entries(_PHYSICAL)[0])
        root = self._file.numbers("senses")[first]
        found, level = {root}, [root]
        while level := [t for s in level for t in self._kinds_of.get(s, ()) if t not in found]:
            found.update(level)
        return frozenset(found)

    def _is_physical(self, synset: int) -> bool:
        return synset in self._physical
