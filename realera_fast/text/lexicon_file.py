"""The lexicon's file, 1.7 MB.

`tools/build_lexicon.py` makes `lexicon.bin` of Debian's package wordnet-base; WordNet's license
stands beside it in `lexicon.LICENSE`. The file is a zlib stream: one line of JSON that names the
columns, then the columns, each of which is decoded when it is first needed.
"""

from __future__ import annotations

import json
import sys
import zlib
from array import array
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path

_FILE = Path(__file__).with_name("lexicon.bin")
_FORMAT = 1


class LexiconFile:
    """Columns of words and of meanings ("synsets"), by name; made by `LexiconFile.read`."""

    def __init__(self, codes: dict[str, str], columns: dict[str, bytes]) -> None:
        self._codes, self._columns = codes, columns
        self._decoded: dict[str, array[int]] = {}
        self._starts: dict[str, array[int]] = {}

    @classmethod
    def read(cls) -> LexiconFile:
        """The file that is part of the package.

        Raises:
            RuntimeError: it is of another release of the package.
        """
        data = zlib.decompress(_FILE.read_bytes())
        line, _, rest = data.partition(b"\n")
        head = json.loads(line)
        if head["format"] != _FORMAT:
            raise RuntimeError(
                f"{_FILE.name}: expected format {_FORMAT}, got {head['format']}; install "
                "realera_fast anew"
            )
        codes, columns, start = {}, {}, 0
        for name, code, size in head["columns"]:
            codes[name], columns[name] = code, rest[start : start + size]
            start += size
        return cls(codes, columns)

    def text(self, name: str) -> str:
        """A column of words, one a line."""
        return self._columns[name].decode()

    def numbers(self, name: str) -> array[int]:
        """A column of numbers, decoded once."""
        if name not in self._decoded:
            self._decoded[name] = _unpacked(self._codes[name], self._columns[name])
        return self._decoded[name]

    def range(self, name: str, row: int) -> range:
        """Places in a column that belong to a row; another column has the counts of all rows."""
        if name not in self._starts:
            counts = self.numbers(f"{name}.counts")
            self._starts[name] = array("I", accumulate(counts, initial=0))
        starts = self._starts[name]
        return range(starts[row], starts[row + 1])

    def targets(self, relation: str, synset: int) -> list[int]:
        """Meanings that a meaning points to."""
        steps = self.numbers(relation)
        return [_target(synset, steps[place]) for place in self.range(relation, synset)]

    def links(self, relation: str) -> Iterator[tuple[int, int]]:
        """Every meaning with each that it points to."""
        steps = iter(self.numbers(relation))
        for synset, count in enumerate(self.numbers(f"{relation}.counts")):
            for _ in range(count):
                yield synset, _target(synset, next(steps))


def _target(synset: int, step: int) -> int:
    """Steps are small where a synset's relatives are near it; the lowest bit is the sign."""
    return synset - (step + 1) // 2 if step & 1 else synset + step // 2


def _unpacked(code: str, data: bytes) -> array[int]:
    """Numbers from little-endian bytes, of which the low ones of all numbers come first."""
    column = array(code)
    size = column.itemsize
    plain = bytearray(len(data))
    count = len(data) // size
    for place in range(size):
        plain[place::size] = data[place * count : (place + 1) * count]
    column.frombytes(bytes(plain))
    if sys.byteorder == "big":
        column.byteswap()
    return column
