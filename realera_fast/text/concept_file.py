"""Concepts from a file: CSV, JSON, YAML or plain lines. A bad entry is reported with its line.

======================  =========================================================================
``.csv``, ``.tsv``      columns ``target``, ``anchor``, ``kind``, ``synonyms`` in any order, named
                        in the first line; only ``target`` must be there. Synonyms are separated by
                        ``|``. An empty anchor is the kind's default; ``-`` is the prompt without
                        the concept.
``.json``, ``.yaml``    a list of strings (``Van Gogh=art``) or of objects with those fields
``.jsonl``              one such value a line
``.txt``                one string a line; empty lines and those that begin with ``#`` don't count
======================  =========================================================================

The file is not trusted: it is read whole or not at all. Lines end where editors end them (LF, CR
LF, CR) and not at Unicode's other separators, which may stand inside of a name.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from realera_fast.runtime import fields_once
from realera_fast.text.concepts import Concept, parse_concept, parse_concepts

FIELDS = ("target", "anchor", "kind", "synonyms")
NOTHING = "-"
"""What stands for the empty anchor in a table."""
_MAX_BYTES = 64 << 20
_SHOWN = 10

Entries = Iterator[tuple[int, Any]]
"""Line and value of each entry; the value is a string, a mapping, or an error."""


class ConceptFileError(ValueError):
    """The file is not a valid list of concepts. The message gives the line of each bad entry."""


def read_concepts(path: str | os.PathLike[str], *, kind: str = "object") -> tuple[Concept, ...]:
    """Reads a list of concepts; its ending tells the format.

    Args:
        path: a ``.csv``, ``.tsv``, ``.json``, ``.jsonl``, ``.yaml``, ``.yml`` or ``.txt`` file.
        kind: of entries that name none.

    Raises:
        FileNotFoundError: there is no such file.
        ConceptFileError: bad entries, each with its line; nothing is returned then.
    """
    path = Path(path)
    reader = _READERS.get(path.suffix.casefold())
    if reader is None:
        raise ConceptFileError(
            f"{path}: expected a file that ends in {', '.join(_READERS)}, got {path.suffix!r}"
        )
    size = path.stat().st_size
    if size > _MAX_BYTES:
        raise ConceptFileError(f"{path}: {size} bytes, at most {_MAX_BYTES} are read; split it")
    data = path.read_bytes()
    text = _decoded(path, data)
    concepts: list[Concept] = []
    first: dict[str, int] = {}
    lines: list[int] = []
    bad: list[tuple[int, str]] = []
    for line, value in reader(text):
        try:
            if isinstance(value, Exception):
                raise value
            concept = _concept(value, kind)
            for word in concept.words:
                if (before := first.setdefault(word, line)) != line:
                    raise ValueError(f"{word!r} is named in line {before} already; leave one out")
        except (ValueError, TypeError) as error:
            bad.append((line, str(error)))
            continue
        concepts.append(concept)
        lines.append(line)
    for concept, line in zip(concepts, lines, strict=True):
        anchor = concept.destination
        if anchor is not None and (other := first.get(anchor)):
            bad.append(
                (line, f"its anchor {anchor!r} is erased in line {other}; choose one that stays")
            )
    if bad:
        told = [f"{path}, line {line}: {message}" for line, message in sorted(bad)[:_SHOWN]]
        if len(bad) > _SHOWN:
            told.append(f"and {len(bad) - _SHOWN} more bad entries")
        raise ConceptFileError("\n".join(told))
    if not concepts:
        raise ConceptFileError(f"{path}: holds no concept")
    return parse_concepts(concepts)


def _decoded(path: Path, data: bytes) -> str:
    """The text of a file, with line feeds at the ends of its lines."""
    hint = "save it as UTF-8"
    if data.startswith((b"\xff\xfe", b"\xfe\xff", b"\x00\x00\xfe\xff")):
        raise ConceptFileError(f"{path}, line 1: is UTF-16 or UTF-32, not UTF-8; {hint}")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConceptFileError(f"{path}, line {line}: is not UTF-8; {hint}") from error
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if (place := text.find("\0")) >= 0:
        line = text.count("\n", 0, place) + 1
        raise ConceptFileError(
            f"{path}, line {line}: holds a NUL character, as UTF-16 does; {hint}"
        )
    return text


def _concept(value: Any, kind: str) -> Concept:
    if isinstance(value, str):
        return parse_concept(value, kind=kind)
    if not isinstance(value, Mapping):
        raise ValueError(
            f"expected a string or an object with {', '.join(FIELDS)}, got {type(value).__name__}"
        )
    odd = [name for name in value if name not in FIELDS]
    if odd:
        raise ValueError(f"unknown field {odd[0]!r}; expected {', '.join(FIELDS)}")
    synonyms = value.get("synonyms", ())
    strings = [value.get("target"), *([value["anchor"]] if value.get("anchor") else [])]
    if not isinstance(synonyms, list | tuple):
        raise ValueError(f"synonyms: expected a list of strings, got {type(synonyms).__name__}")
    for text in (*strings, *synonyms):
        if isinstance(text, Exception):
            raise text
        if not isinstance(text, str):
            raise ValueError(f"expected strings, got {text!r}"[:200])
    found = value.get("kind")
    return Concept(value["target"], value.get("anchor"), found or kind, tuple(synonyms))


def _from_lines(text: str) -> Entries:
    for line, value in enumerate(text.split("\n"), start=1):
        if value.strip() and not value.lstrip().startswith("#"):
            yield line, value


def _from_table(delimiter: str) -> Callable[[str], Entries]:
    def read(text: str) -> Entries:
        rows = csv.reader(io.StringIO(text), delimiter=delimiter, strict=True)
        names: list[str] | None = None
        while True:
            line = rows.line_num + 1
            try:
                row = next(rows, None)
            except csv.Error as error:
                yield line, ValueError(f"is not a row of this table ({error})")
                return
            if row is None:
                return
            if not any(cell.strip() for cell in row):
                continue
            if names is None:
                names = [cell.strip().casefold() for cell in row]
                if "target" not in names or set(names) - set(FIELDS) or len(set(names)) < len(row):
                    yield (
                        line,
                        ValueError(
                            f"expected a first line that names the columns ({', '.join(FIELDS)}; "
                            f"target must be there), got {', '.join(map(repr, names))}"[:300]
                        ),
                    )
                    return
                continue
            yield line, _row(names, row)

    return read


def _row(names: list[str], row: list[str]) -> Any:
    if len(row) > len(names):
        return ValueError(
            f"has {len(row)} cells for {len(names)} columns; put text with separators in quotes"
        )
    cells = dict(zip(names, (cell.strip() for cell in row), strict=False))
    value: dict[str, Any] = {"target": cells.get("target", "")}
    if cells.get("anchor"):
        value["anchor"] = "" if cells["anchor"] == NOTHING else cells["anchor"]
    if cells.get("kind"):
        value["kind"] = cells["kind"]
    value["synonyms"] = [w.strip() for w in cells.get("synonyms", "").split("|") if w.strip()]
    return value


def _fields(pairs: list[tuple[str, Any]]) -> Any:
    """The fields of a JSON object; an error where one is there twice, so that reading goes on."""
    try:
        return fields_once(pairs)
    except ValueError as error:
        return error


_DECODER = json.JSONDecoder(
    object_pairs_hook=_fields,
    parse_constant=lambda name: ValueError(f"holds {name}, which is not a number of JSON"),
)


def _from_json_lines(text: str) -> Entries:
    for line, value in enumerate(text.split("\n"), start=1):
        if not value.strip():
            continue
        try:
            yield line, _DECODER.decode(value)
        except (ValueError, RecursionError) as error:
            yield line, ValueError(f"is not JSON: {error}"[:200])


def _from_json(text: str) -> Entries:
    """Element by element, so that the line of each is known."""
    at, line = 0, 1

    def skip(to: int) -> int:
        nonlocal line
        end = to
        while end < len(text) and text[end] in " \t\r\n":
            end += 1
        line += text.count("\n", at, end)
        return end

    at = skip(at)
    if text[at : at + 1] != "[":
        yield line, ValueError("expected a list: [ ... ]")
        return
    at = skip(at + 1)
    if text[at : at + 1] == "]":
        return
    while True:
        try:
            value, end = _DECODER.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            wrong = getattr(error, "lineno", line)
            deep = isinstance(error, RecursionError)
            what = "nested too deeply" if deep else getattr(error, "msg", error)
            yield wrong, ValueError(f"is not JSON: {what}"[:200])
            return
        yield line, value
        at = skip(end)
        mark = text[at : at + 1]
        if mark == "]" and text[at + 1 :].strip() == "":
            return
        if mark != ",":
            yield line, ValueError(f"expected a comma or the end of the list, got {mark!r}")
            return
        at = skip(at + 1)


def _from_yaml(text: str) -> Entries:
    try:
        import yaml
    except ImportError as error:
        raise ConceptFileError("YAML needs the package pyyaml: pip install pyyaml") from error
    loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    # YAML 1.1 ends lines here too.
    text = text.translate(dict.fromkeys((0x85, 0x2028, 0x2029), " "))
    try:
        root = yaml.compose(text, loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        yield (mark.line + 1 if mark else 1), ValueError(f"is not YAML: {error.problem}"[:200])
        return
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        place = getattr(error, "position", 0)
        yield text.count("\n", 0, place) + 1, ValueError(f"is not YAML: {error}"[:200])
        return
    if root is None:
        return
    if not isinstance(root, yaml.SequenceNode):
        yield 1, ValueError("expected a list: lines that begin with '- '")
        return
    # Nodes are read by hand, three levels of them: an alias of an alias expands to nothing here.
    for node in root.value:
        yield node.start_mark.line + 1, _plain(node, 3)


def _plain(node: Any, depth: int) -> Any:
    """A YAML node as strings, lists and mappings; words like ``no`` and numbers stay as written."""
    kind = type(node).__name__
    if kind == "ScalarNode":
        empty = node.tag == "tag:yaml.org,2002:null"
        return None if empty else node.value
    if depth == 0:
        return ValueError("is nested too deeply")
    if kind == "SequenceNode":
        return [_plain(item, depth - 1) for item in node.value[:1000]]
    values = {}
    for key, item in node.value:
        name = _plain(key, 0)
        if not isinstance(name, str) or name in values:
            return ValueError("has a field without a name, or one twice")
        values[name] = _plain(item, depth - 1)
    return values


_READERS: Mapping[str, Callable[[str], Entries]] = {
    ".csv": _from_table(","),
    ".tsv": _from_table("\t"),
    ".json": _from_json,
    ".jsonl": _from_json_lines,
    ".yaml": _from_yaml,
    ".yml": _from_yaml,
    ".txt": _from_lines,
}
