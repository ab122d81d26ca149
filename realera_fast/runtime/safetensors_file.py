"""Safetensors files: written deterministically and atomically, and patched without loading them.

The format is made here, not by the safetensors package, which orders the metadata by chance; it
also can't replace single tensors of a file of many gigabytes.
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from realera_fast.runtime.files import read_json, regular, write_atomically
from realera_fast.runtime.names import valid

MAX_HEADER_BYTES = 16 << 20
"""Of the files that are written here; a header of one that is read may have 100 MB."""
_MAX_READ = 100_000_000

NAMES: Mapping[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}
"""Dtypes by name, of weights that can be edited."""
_DTYPES = {name: dtype for dtype, name in NAMES.items()}


class SafetensorsFileError(ValueError):
    """The file is not a valid safetensors file."""


@dataclass(frozen=True)
class Entry:
    """One tensor of a file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    """Of its data, from the first byte after the header."""
    end: int


@dataclass(frozen=True)
class Header:
    """What a file says about itself."""

    metadata: Mapping[str, str]
    entries: Mapping[str, Entry]
    start: int
    """Byte of the file that the data begins at."""


def encode_json(value: Any) -> str:
    """The same text for the same value, whatever order it was made in."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The values of a tensor as they stand in a file."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Path:
    """Writes a file that is complete or absent; missing folders are made.

    Raises:
        ValueError: more metadata than a header may have, or `path` is a folder.
        OSError: the folder can't be written or the disk is full; an older file stays as it was.
    """
    entries: dict[str, Any] = {}
    chunks = []
    end = 0
    # Widest dtype first, like the safetensors package: all data is then aligned.
    for name, tensor in sorted(tensors.items(), key=lambda item: (-item[1].itemsize, item[0])):
        data = tensor_bytes(tensor)
        entries[name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [end, end + len(data)],
        }
        end += len(data)
        chunks.append(data)
    head = _encoded(entries, metadata)
    if len(head) > MAX_HEADER_BYTES:
        raise ValueError(
            f"report, config: {len(head)} bytes of JSON, at most {MAX_HEADER_BYTES} are saved"
        )
    return _place(path, head, *chunks)


def read_header(path: Path) -> Header:
    """Metadata and the place of every tensor, checked against the size of the file.

    Raises:
        FileNotFoundError: there is no such file.
        SafetensorsFileError: it is no valid safetensors file.
    """
    if path.is_dir():
        raise SafetensorsFileError(f"{path}: is a folder, expected a file")
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_READ):
            raise SafetensorsFileError(f"{path}: is truncated or not a safetensors file")
        text = file.read(length)
    try:
        values = read_json(text)
        metadata = values.pop("__metadata__", {})
        entries = {
            name: Entry(
                value["dtype"], tuple(map(int, value["shape"])), *map(int, value["data_offsets"])
            )
            for name, value in values.items()
        }
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise SafetensorsFileError(f"{path}: its header is not valid: {error!r:.100}") from error
    for name, entry in entries.items():
        if not 0 <= entry.begin <= entry.end <= size - 8 - length:
            raise SafetensorsFileError(f"{path}: {name[:100]!r} lies outside of the file")
    if not all(isinstance(text, str) for text in metadata.values()):
        raise SafetensorsFileError(f"{path}: its metadata is not text")
    return Header(metadata, entries, 8 + length)


def tensor_at(data: memoryview, header: Header, name: str) -> Tensor:
    """A tensor of a mapped file, without copying it; not to be written to.

    Args:
        data: the whole file.
    """
    entry = header.entries[name]
    dtype = _DTYPES[entry.dtype]
    count = (entry.end - entry.begin) // dtype.itemsize
    if not count:
        return torch.zeros(entry.shape, dtype=dtype, device="cpu")
    values = torch.frombuffer(data, dtype=dtype, count=count, offset=header.start + entry.begin)
    return values.view(entry.shape)


def patch(
    source: Path,
    target: Path,
    replaced: Mapping[str, Tensor],
    metadata: Mapping[str, str],
) -> Path:
    """Copies a file with some tensors replaced and some metadata added.

    All other bytes of data are those of the source. Nothing is loaded as a whole.

    Args:
        replaced: tensors of the shape and dtype that they have in the file.
        metadata: added to that of the file.
    """
    header = read_header(source)
    for name, tensor in replaced.items():
        entry = header.entries[name]
        if NAMES[tensor.dtype] != entry.dtype or tuple(tensor.shape) != entry.shape:
            raise ValueError(
                f"{name}: expected {entry.dtype} {list(entry.shape)}, got {tensor.dtype} "
                f"{list(tensor.shape)}"
            )
    entries = {
        name: {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [entry.begin, entry.end],
        }
        for name, entry in header.entries.items()
    }
    head = _encoded(entries, {**header.metadata, **metadata})
    with (
        open(source, "rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
        memoryview(mapped) as data,
    ):
        chunks = []
        at = header.start
        for name in sorted(replaced, key=lambda name: header.entries[name].begin):
            entry = header.entries[name]
            chunks += [data[at : header.start + entry.begin], tensor_bytes(replaced[name])]
            at = header.start + entry.end
        chunks.append(data[at:])
        try:
            return _place(target, head, *chunks)
        finally:
            # The map can't be closed while parts of it are held.
            for chunk in chunks:
                chunk.release()


def _encoded(entries: Mapping[str, Any], metadata: Mapping[str, str]) -> bytes:
    header = encode_json({"__metadata__": dict(metadata), **entries}).encode()
    return header + b" " * (-len(header) % 8)


def _place(path: Path, head: bytes, *chunks: memoryview) -> Path:
    # The safetensors package opens no other.
    valid(str(path), "path")
    if path.is_dir():
        raise ValueError(f"path: {path} is a folder; name a file in it")
    try:
        target = regular(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(target, len(head).to_bytes(8, "little"), head, *chunks)
    except OSError as error:
        raise OSError(
            error.errno, f"could not save, no file was changed: {error.strerror}", str(path)
        ) from error
    return path
