"""The file format of an erasure. A file is not trusted: everything in it is checked."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from realera_fast.erasure.edit import MAP_KEYS, Edit
from realera_fast.models import Family, LoraFactors, Stream, is_self_attention, stream_of
from realera_fast.runtime import MAX_HEADER_BYTES, encode_json, read_json, write
from realera_fast.solver import ConceptMap, IncrementalSystem
from realera_fast.text import Concept

T = TypeVar("T")

FORMAT_VERSION = 1
"""Raised when older files can no longer be read."""

MAX_FILE_BYTES = 2 << 30
_MAX_DEPTH = 32
_MAX_NAME = 256
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z0-9_]+)*")
_HASH = re.compile(r"[0-9a-f]{64}")
SYSTEM_FIELDS: Mapping[Stream, str] = {"sequence": "system", "pooled": "pooled_system"}
"""What the kept equations are called, by the text that they are about."""
METADATA_FIELDS = ("concepts", "config", "provenance", "report")


class ErasureFileError(ValueError):
    """The file is not a valid saved erasure. The message says what is wrong with it."""


def check_name(name: str) -> None:
    if len(name) > _MAX_NAME or not _NAME.fullmatch(name):
        raise ValueError(f"not a module name: {name[:_MAX_NAME]!r}")


def save(
    path: Path,
    edit: Edit,
    fields: Mapping[str, Any],
    systems: Mapping[Stream, IncrementalSystem],
) -> Path:
    """Writes the file, as `Erasure.save`.

    Args:
        edit: the factors.
        fields: plain JSON values of `METADATA_FIELDS`.
        systems: the kept equations.

    Returns:
        The path written.
    """
    for concept_map in edit.maps.values():
        if concept_map.rank > concept_map.width:
            raise ValueError(
                f"map: its rank {concept_map.rank} exceeds its width; save a compressed() one"
            )
    for name in (*edit.lora, *(edit.takes or ())):
        check_name(name)
    metadata = {
        "format": "pt",
        "realera_fast": str(FORMAT_VERSION),
        **{field: encode_json(fields[field]) for field in METADATA_FIELDS},
    }
    tensors = edit.tensors()
    for stream, system in systems.items():
        field = SYSTEM_FIELDS[stream]
        metadata[field] = encode_json(system.state())
        tensors |= {f"{field}.{name}": t for name, t in system.tensors().items()}
        size = sum(tensor.nbytes for tensor in tensors.values())
        if size > MAX_FILE_BYTES - MAX_HEADER_BYTES:
            raise ValueError(
                f"system: {size} bytes of equations, more than the {MAX_FILE_BYTES} of a file "
                "that can be loaded; save dataclasses.replace(erasure, system=None, "
                "pooled_system=None)"
            )
    return write(path, tensors, metadata)


# Reading: nothing in a file is trusted


def load(path: Path, build: Callable[..., T]) -> T:
    """Reads what `save` wrote, as `Erasure.load`.

    Args:
        build: makes the erasure of its fields, given by name; it may refuse their values.

    Raises:
        FileNotFoundError: there is no such file.
        ErasureFileError: it is not a valid erasure.
    """
    try:
        metadata, tensors = read_file(path)
        fields = {field: parse_field(field, metadata[field]) for field in METADATA_FIELDS}
        concepts = concepts_of(fields.pop("concepts"))
        check_provenance(fields["provenance"])
        lora = {
            name: LoraFactors(tensors[f"lora.{name}.down"], tensors[f"lora.{name}.up"])
            for name in names_with_lora(tensors)
        }
        maps = {
            stream: ConceptMap(tensors[f"{key}.left"], tensors[f"{key}.right"])
            for stream, key in MAP_KEYS.items()
            if f"{key}.left" in tensors
        }
        systems: dict[str, Any] = {}
        for field in SYSTEM_FIELDS.values():
            if field in metadata:
                start = f"{field}."
                inner = {
                    key.removeprefix(start): tensor
                    for key, tensor in tensors.items()
                    if key.startswith(start)
                }
                state = parse_field(field, metadata[field])
                systems[field] = IncrementalSystem.from_tensors(inner, state)
        return build(
            map=maps["sequence"],
            lora=lora,
            concepts=concepts,
            **fields,
            pooled_map=maps.get("pooled"),
            **systems,
        )
    except ErasureFileError as error:
        raise ErasureFileError(f"{path}: {error}") from error.__cause__
    except (KeyError, OverflowError, TypeError, ValueError) as error:
        raise ErasureFileError(f"{path}: {error}") from error


def read_file(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors, with sizes, keys, shapes and dtypes checked before data is read."""
    from safetensors import SafetensorError, safe_open

    if path.is_dir():
        raise ErasureFileError("is a folder, expected a file")
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(8)
    if len(start) < 8:
        raise ErasureFileError(f"is truncated: {size} bytes")
    if size > MAX_FILE_BYTES:
        raise ErasureFileError(f"is too large: {size} bytes, at most {MAX_FILE_BYTES} are read")
    header = int.from_bytes(start, "little")
    if header > min(size - 8, MAX_HEADER_BYTES):
        raise ErasureFileError(
            f"is truncated or not a safetensors file: a header of {header} bytes in {size}"
        )
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            shapes = {}
            for name in file.keys():  # noqa: SIM118, not a dictionary
                view = file.get_slice(name)
                shapes[name] = (view.get_dtype(), tuple(view.get_shape()))
            _check_metadata(metadata)
            inner: dict[str, Any] = {}
            for field in SYSTEM_FIELDS.values():
                own = [key for key in shapes if key.startswith(f"{field}.")]
                if own and field not in metadata:
                    raise ErasureFileError(f"has tensors of a {field}, but no description of it")
                inner |= {key: shapes.pop(key) for key in own}
            for key, (dtype, shape) in inner.items():
                if dtype != "F64" or len(shape) != 2:
                    raise ErasureFileError(f"{key} has dtype {dtype}, shape {list(shape)}")
            _check_shapes(shapes)
            shapes |= inner
            tensors = {name: file.get_tensor(name) for name in shapes}
    except SafetensorError as error:
        raise ErasureFileError(f"is truncated or not a safetensors file: {error}") from error
    return metadata, tensors


def _check_metadata(metadata: Mapping[str, str]) -> None:
    version = metadata.get("realera_fast")
    if version is None:
        raise ErasureFileError("is not an erasure (another safetensors file?)")
    if version != str(FORMAT_VERSION):
        raise ErasureFileError(
            f"has format version {version[:20]!r}, this release reads {FORMAT_VERSION}; update it"
        )
    expected = {"format", "realera_fast", *METADATA_FIELDS}
    given = set(metadata) - set(SYSTEM_FIELDS.values())
    if given != expected:
        odd = sorted(given ^ expected)[:5]
        raise ErasureFileError(f"has missing or unknown metadata: {odd}")


def names_with_lora(tensors: Iterable[str]) -> list[str]:
    keys = [key.removeprefix("lora.") for key in tensors if key.startswith("lora.")]
    return sorted({key.rpartition(".")[0] for key in keys})


def _check_shapes(shapes: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
    names = names_with_lora(shapes)
    maps: dict[str, Stream] = {
        key: stream
        for stream, key in MAP_KEYS.items()
        if stream == "sequence" or f"{key}.left" in shapes
    }
    expected = {f"{field}.{side}" for field in maps for side in ("left", "right")}
    for name in names:
        check_name(name)
        expected |= {f"lora.{name}.down", f"lora.{name}.up"}
    if set(shapes) != expected:
        odd = [key[:_MAX_NAME] for key in sorted(set(shapes) ^ expected)[:5]]
        raise ErasureFileError(f"has missing or unknown tensors: {odd}")
    for key, (dtype, shape) in shapes.items():
        allowed = ("F32", "F64") if key.split(".")[0] in maps else ("F32",)
        if dtype not in allowed:
            raise ErasureFileError(f"{key} has dtype {dtype}, expected {' or '.join(allowed)}")
        if len(shape) != 2:
            raise ErasureFileError(f"{key} has shape {list(shape)}, expected a matrix")
    widths: dict[Stream | None, int] = {}
    for field, stream in maps.items():
        (left_dtype, left), (right_dtype, right) = shapes[f"{field}.left"], shapes[f"{field}.right"]
        width, rank = left
        if right != (rank, width) or right_dtype != left_dtype or width < 1 or rank > width:
            raise ErasureFileError(
                f"{field}.left {left_dtype} {list(left)} and {field}.right {right_dtype} "
                f"{list(right)} don't make a map [d, k] [k, d] with k <= d"
            )
        widths[stream] = width
    for name in names:
        down, up = shapes[f"lora.{name}.down"][1], shapes[f"lora.{name}.up"][1]
        takes = None if is_self_attention(name) else stream_of(name)
        features = widths.get(takes, down[1])
        fits = down[1] == features and up[1] == down[0] and min(features, up[0]) >= 1
        if not fits or not 1 <= down[0] <= max(features, up[0]):
            raise ErasureFileError(
                f"lora.{name}: down {list(down)}, up {list(up)} don't make an update "
                f"[o, {features}]"
            )


def parse_field(field: str, text: str) -> Any:
    value = parse_json_value(field, text)
    kind = list if field == "concepts" else dict
    if not isinstance(value, kind):
        raise ErasureFileError(f"its {field} is a {type(value).__name__}, not a {kind.__name__}")
    return value


def parse_json_value(field: str, text: str) -> Any:
    try:
        # A report may say that a number overflowed.
        value = read_json(text, constants=True)
    except (ValueError, RecursionError) as error:
        raise ErasureFileError(f"its {field} is not JSON: {str(error)[:100]}") from error
    level, depth = [value], 0
    while level:
        if depth > _MAX_DEPTH:
            raise ErasureFileError(f"its {field} is nested deeper than {_MAX_DEPTH} levels")
        inner: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                inner += item.values()
            elif isinstance(item, list):
                inner += item
        level, depth = inner, depth + 1
    return value


def concepts_of(values: list[Any]) -> tuple[Concept, ...]:
    for value in values:
        fields = value if isinstance(value, dict) else {}
        synonyms = fields.get("synonyms")
        typed = (
            isinstance(fields.get("target"), str)
            and isinstance(fields.get("anchor"), str | None)
            and isinstance(fields.get("kind"), str)
            and isinstance(synonyms, list)
            and all(isinstance(word, str) for word in synonyms)
        )
        if not typed:
            raise ErasureFileError(f"holds a concept that is none: {str(value)[:100]}")
    return tuple(Concept.from_dict(value) for value in values)


def check_provenance(provenance: Mapping[str, Any]) -> None:
    hashes = provenance.get("base_hashes")
    valid = (
        isinstance(hashes, dict)
        and hashes
        and all(
            key in ("float64", "float32", "float16", "bfloat16")
            and isinstance(value, str)
            and _HASH.fullmatch(value)
            for key, value in hashes.items()
        )
    )
    if not valid:
        raise ErasureFileError("its provenance holds no valid base_hashes")
    if provenance.get("reading") is not None:
        try:
            reading = Family.from_dict(provenance["reading"])
        except ValueError as error:
            raise ErasureFileError(f"its provenance holds a reading that {error}") from error
        for name in reading.maps or {}:
            check_name(name)
    preserve = provenance.get("preserve", [])
    if not (isinstance(preserve, list) and all(isinstance(word, str) for word in preserve)):
        raise ErasureFileError("its provenance holds preserved words that are none")
    history = provenance.get("history", [])
    known = isinstance(history, list) and all(
        isinstance(entry, dict)
        and isinstance(entry.get("action"), str)
        and isinstance(entry.get("fingerprint"), str)
        and isinstance(entry.get("concepts"), list)
        and all(isinstance(word, str) for word in entry["concepts"])
        for entry in history
    )
    if not known:
        raise ErasureFileError("its provenance holds a history that is none")
