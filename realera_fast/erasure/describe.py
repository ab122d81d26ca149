"""What a file holds, in words."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from realera_fast.erasure.erasure import Erasure
from realera_fast.erasure.file import (
    ErasureFileError,
    check_provenance,
    concepts_of,
    parse_json_value,
)
from realera_fast.runtime import SafetensorsFileError, read_header


def read_description(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What a file of this library says about itself, whichever format it is of.

    Returns:
        ``file`` and ``holds``, and what was written: ``concepts``, ``anchors`` that nobody named,
        ``config``, ``provenance`` (with its history), ``solve``, ``report_sha256``.

    Raises:
        FileNotFoundError: there is no such file.
        ErasureFileError: it is no safetensors file, or says nothing about an erasure.
    """
    path = Path(path)
    try:
        header = read_header(path)
    except SafetensorsFileError as error:
        raise ErasureFileError(str(error)) from error
    kind = next(
        (
            name
            for ending, name in _HOLDS.items()
            if any(k.endswith(ending) for k in header.entries)
        ),
        "edited tensors",
    )
    metadata = header.metadata
    if "realera_fast" in metadata:
        metadata = Erasure.load(path).metadata()
    fields = ("concepts", "config", "provenance", "solve", "report_sha256")
    if not all(f"realera_fast.{field}" in metadata for field in fields):
        raise ErasureFileError(f"{path}: says nothing about an erasure")
    try:
        found = {
            field: parse_json_value(field, metadata[f"realera_fast.{field}"]) for field in fields
        }
        # Files of earlier releases have none.
        found["anchors"] = parse_json_value("anchors", metadata.get("realera_fast.anchors", "{}"))
        if not isinstance(found["concepts"], list) or not isinstance(found["provenance"], dict):
            raise ErasureFileError("its concepts are no list, or its provenance is no object")
        concepts_of(found["concepts"])
        check_provenance(found["provenance"])
    except ErasureFileError as error:
        raise ErasureFileError(f"{path}: {error}") from error.__cause__
    return {"file": str(path), "holds": kind, **found}


_HOLDS = {
    "map.left": "the factors of an erasure (a delta)",
    ".lora_A.weight": "an adapter (diffusers)",
    ".lora_down.weight": "an adapter (kohya)",
}
"""What a file is, by the end of a key in it."""
