"""Builds realera_fast/text/lexicon.bin from WordNet 3.0, and copies its license beside it.

apt install wordnet-base                 # Debian's package, in /usr/share/wordnet
python tools/build_lexicon.py            # the file and WordNet's license beside it
python tools/build_lexicon.py --check    # exit 1 if they are not what WordNet's files say

The file holds nouns and adjectives with the relations that neighbors of a concept are made of, and
the bare words of verbs and adverbs, so that a word can be told from an ending. It is a zlib
stream: one line of JSON that names columns and their bytes, then the columns. zlib and not xz, as
it is read in 15 ms in place of 75 and is a tenth larger.
`realera_fast.text.lexicon_file` reads it and says what each column is. The same files give the same
bytes.
"""

from __future__ import annotations

import json
import re
import sys
import zlib
from array import array
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from realera_fast.text import run_together

ROOT = Path(__file__).resolve().parents[1]
LEXICON = ROOT / "realera_fast" / "text" / "lexicon.bin"
LICENSE = ROOT / "realera_fast" / "text" / "lexicon.LICENSE"
WORDNET = Path("/usr/share/wordnet")

PARTS = {"noun": 1, "adj": 2, "verb": 4, "adv": 8}
"""Bits of the column `parts`: as what a word is used."""
_TYPES = {"noun": "1", "verb": "2", "adj": "35", "adv": "4"}
"""Types of a synset in the keys of WordNet's counts; 5 is an adjective around another."""
_HYPERNYM, _INSTANCE, _SIMILAR, _DERIVED = "@", "@i", "&^", "+="


@dataclass
class Synset:
    """One meaning: the words that have it and the meanings it points to."""

    number: int
    file: int
    """Number of the lexicographer's file: 5 is noun.animal."""
    words: list[tuple[str, int]] = field(default_factory=list)
    """As they are written, each with its number in the lexicographer's file."""
    pointers: list[tuple[str, str, int]] = field(default_factory=list)
    """Symbol, part of speech and offset of the target."""


def _lines(path: Path) -> Iterator[str]:
    """Lines of one of WordNet's files without the license, which is indented."""
    for line in path.read_text(encoding="ascii").splitlines():
        if line and not line.startswith(" "):
            yield line


def _written(word: str) -> str:
    """A word without the mark of an adjective's place, and with spaces."""
    return re.sub(r"\((?:a|p|ip)\)$", "", word).replace("_", " ")


def read_synsets(folder: Path, part: str, start: int) -> dict[int, Synset]:
    """Synsets of a part of speech by their offset, numbered from `start` in the file's order."""
    found: dict[int, Synset] = {}
    for line in _lines(folder / f"data.{part}"):
        fields = line.split(" | ")[0].split()
        synset = Synset(start + len(found), int(fields[1]))
        count = int(fields[3], 16)
        for place in range(4, 4 + 2 * count, 2):
            synset.words.append((_written(fields[place]), int(fields[place + 1], 16)))
        pointers = fields[5 + 2 * count :]
        for place in range(0, 4 * int(fields[4 + 2 * count]), 4):
            symbol, offset, target = pointers[place : place + 3]
            synset.pointers.append((symbol, target, int(offset)))
        found[int(fields[0])] = synset
    return found


def read_order(folder: Path, part: str) -> dict[str, list[int]]:
    """Offsets of the meanings of each word in lower case, the most frequent first."""
    found = {}
    for line in _lines(folder / f"index.{part}"):
        fields = line.split()
        found[fields[0].replace("_", " ")] = [int(f) for f in fields[-int(fields[2]) :]]
    return found


def read_counts(folder: Path) -> dict[tuple[str, str, int, int], int]:
    """How often a meaning was tagged: by word, type of synset, lexicographer's file and number."""
    found = {}
    for line in _lines(folder / "cntlist.rev"):
        key, _, count = line.split()
        word, _, place = key.partition("%")
        kind, file, number = place.split(":")[:3]
        found[word.replace("_", " "), kind, int(file), int(number)] = int(count)
    return found


def _tagged(counts: dict, part: str, word: str, synset: Synset, number: int) -> int:
    return sum(counts.get((word.lower(), k, synset.file, number), 0) for k in _TYPES[part])


@dataclass
class Entry:
    """A word as it is written."""

    parts: int = 0
    senses: list[tuple[int, int, int, int]] = field(default_factory=list)
    """Part of speech and rank for the order, then the synset and how often it was tagged."""
    others: int = 0
    """How often it was tagged as a verb or an adverb."""


def read_entries(folder: Path, synsets: dict[str, dict[int, Synset]]) -> dict[str, Entry]:
    """Every word with its meanings."""
    counts = read_counts(folder)
    entries: dict[str, Entry] = defaultdict(Entry)
    for part, bit in PARTS.items():
        order = read_order(folder, part)
        for offset, synset in synsets[part].items():
            for word, number in synset.words:
                entry = entries[word]
                entry.parts |= bit
                tagged = _tagged(counts, part, word, synset, number)
                if part in ("verb", "adv"):
                    entry.others += tagged
                else:
                    rank = order[word.lower()].index(offset)
                    entry.senses.append((bit, rank, synset.number, tagged))
    for entry in entries.values():
        entry.senses.sort()
    return entries


def _numbers(code: str, values: list[int]) -> bytes:
    """Little-endian bytes, the low bytes of all numbers first: equal high bytes then lie together.

    Args:
        code: "B", "H" or "I": 1, 2 or 4 bytes a number.
    """
    column = array(code, values)
    if sys.byteorder == "big":
        column.byteswap()
    plain = column.tobytes()
    return b"".join(plain[place :: column.itemsize] for place in range(column.itemsize))


def _relation(name: str, rows: list[list[int]]) -> list[tuple[str, str, bytes]]:
    """Two columns: how many targets each synset has, and the targets, each less the synset.

    A target is near its synset in WordNet's files. The lowest bit is the sign.
    """
    steps = [target - number for number, row in enumerate(rows) for target in row]
    return [
        (f"{name}.counts", "B", _numbers("B", [len(row) for row in rows])),
        (name, "I", _numbers("I", [2 * s if s >= 0 else -2 * s - 1 for s in steps])),
    ]


def columns(folder: Path) -> list[tuple[str, str, bytes]]:
    """Name, type and bytes of every column."""
    nouns = read_synsets(folder, "noun", 0)
    synsets = {"noun": nouns, "adj": read_synsets(folder, "adj", len(nouns))}
    synsets |= {part: read_synsets(folder, part, 0) for part in ("verb", "adv")}
    entries = read_entries(folder, synsets)
    words = sorted(entries, key=lambda word: (run_together(word), word))
    rows = [*synsets["noun"].values(), *synsets["adj"].values()]
    by_letter = {"n": synsets["noun"], "a": synsets["adj"], "s": synsets["adj"]}

    def targets(synset: Synset, symbols: tuple[str, ...], letters: str) -> list[int]:
        pointed = (
            by_letter[letter][offset].number
            for symbol, letter, offset in synset.pointers
            if symbol in symbols and letter in letters
        )
        return list(dict.fromkeys(pointed))

    place_of = {word: place for place, word in enumerate(words)}
    members = [[place_of[word] for word, _ in synset.words] for synset in rows]
    senses = [sense for word in words for sense in entries[word].senses]
    adjectives = [targets(s, tuple(_DERIVED), "as") if s.number < len(nouns) else [] for s in rows]
    exceptions = {
        part: "\n".join(
            f"{fields[0]} {base}"
            for fields in (line.split() for line in _lines(folder / f"{part}.exc"))
            for base in fields[1:]
        )
        for part in ("noun", "adj", "verb")
    }
    return [
        ("words", "text", "\n".join(words).encode()),
        ("parts", "B", _numbers("B", [entries[word].parts for word in words])),
        ("others", "H", _numbers("H", [entries[word].others for word in words])),
        ("senses.counts", "B", _numbers("B", [len(entries[word].senses) for word in words])),
        ("senses", "I", _numbers("I", [synset for _, _, synset, _ in senses])),
        ("senses.tags", "H", _numbers("H", [tagged for _, _, _, tagged in senses])),
        ("members.counts", "B", _numbers("B", [len(row) for row in members])),
        ("members", "I", _numbers("I", [word for row in members for word in row])),
        ("files", "B", _numbers("B", [synset.file for synset in rows])),
        *_relation("hypernyms", [targets(s, (_HYPERNYM,), "n") for s in rows]),
        *_relation("instance_of", [targets(s, (_INSTANCE,), "n") for s in rows]),
        *_relation("similar", [targets(s, tuple(_SIMILAR), "as") for s in rows]),
        *_relation("adjectives", adjectives),
        *((f"{part}.exceptions", "text", text.encode()) for part, text in exceptions.items()),
    ]


def payload(folder: Path) -> bytes:
    """What the file holds, before it is compressed."""
    found = columns(folder)
    head = {"format": 1, "columns": [[name, kind, len(data)] for name, kind, data in found]}
    line = json.dumps(head, separators=(",", ":")).encode() + b"\n"
    return line + b"".join(data for _, _, data in found)


def compressed(data: bytes) -> bytes:
    return zlib.compress(data, 9)


def license(folder: Path) -> str:
    """WordNet's notice, as it stands at the head of its files, without their line numbers."""
    lines = (folder / "data.noun").read_text(encoding="ascii").splitlines()
    head = [line for line in lines[:40] if line.startswith(" ")]
    return "".join(re.sub(r"^ +\d+ ?", "", line).rstrip() + "\n" for line in head)


def main(arguments: list[str]) -> int:
    data = payload(WORDNET)
    if "--check" in arguments:
        same = zlib.decompress(LEXICON.read_bytes()) == data
        return 0 if same and LICENSE.read_text(encoding="ascii") == license(WORDNET) else 1
    LEXICON.write_bytes(compressed(data))
    LICENSE.write_text(license(WORDNET), encoding="ascii")
    print(f"{LEXICON.relative_to(ROOT)}: {LEXICON.stat().st_size} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
