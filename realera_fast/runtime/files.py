"""Files and folders that are complete or absent, and JSON that means one thing."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

MARKER = "complete.json"
"""Written last into a folder: sizes and SHA-256 of its files. Without it the folder is a part."""


def read_json(text: str | bytes, *, constants: bool = False) -> Any:
    """The value of a JSON text.

    Args:
        constants: allow NaN and Infinity, which Python writes and JSON does not have.

    Raises:
        ValueError: it is not JSON, or names a field of an object twice, so that one value would be
            lost.
    """
    if isinstance(text, bytes):
        text = text.decode("utf-8-sig")
    return json.loads(
        text.removeprefix("\ufeff"),
        object_pairs_hook=fields_once,
        parse_constant=None if constants else _no_constant,
    )


def fields_once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """The fields of a JSON object.

    Raises:
        ValueError: one is there twice.
    """
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"names the field {twice[:100]!r} twice; leave one out")
    return fields


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"holds {name}, which is not a number of JSON")


def regular(path: str | Path) -> Path:
    """Where a file that is written to `path` comes to lie: links are followed, and stay.

    Raises:
        OSError: something is there that is not a regular file (a folder, a pipe, a device), or it
            is this program's own output.
    """
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return Path(os.path.realpath(path))
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(errno.EISDIR, "is a folder; name a file in it", str(path))
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "is a pipe or a device; name a regular file", str(path))
    # Such as /dev/stdout, where the shell sends it to a file.
    if any(os.path.samestat(found, output) for output in _outputs()):
        raise FileExistsError(
            errno.EEXIST, "is where this program's output goes; name another file", str(path)
        )
    return Path(os.path.realpath(path))


def _outputs() -> Iterator[os.stat_result]:
    """What standard output and standard error are, where they are open."""
    for stream in (1, 2):
        with contextlib.suppress(OSError):
            yield os.fstat(stream)


def _prefix(path: Path) -> str:
    """Of a temporary name beside `path`; a whole name with more to it could be too long."""
    return f".{os.fsencode(path.name)[:100].decode(errors='ignore')}."


def write_atomically(path: str | Path, *chunks: bytes | memoryview) -> None:
    """Writes a file so that a reader sees the old one or the whole new one, never a part.

    Args:
        path: the file; its folder must exist. A link keeps pointing where it did.
        chunks: its contents, one after the other.

    Raises:
        OSError: it can't be written, or something is there that is not a regular file.
    """
    path = regular(path)
    temporary = path.with_name(f"{_prefix(path)}{secrets.token_hex(8)}.tmp")
    # Exclusive, and with the permissions of an ordinary new file.
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with os.fdopen(handle, "wb") as file:
            for chunk in chunks:
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    # The new name outlives a power cut too, where folders can be synchronized.
    with contextlib.suppress(OSError):
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


@contextlib.contextmanager
def folder_atomically(out: Path, *, replace: bool = False) -> Iterator[Path]:
    """An empty folder beside `out` that becomes `out` in one step at the end, or never.

    It is made at once, so that an unwritable place fails before any long work. A marker (`MARKER`)
    is written into it last.

    Args:
        replace: allow a folder that is not empty: entries of the same name are replaced one by one,
            the marker last, and all others stay.

    Raises:
        FileExistsError: `out` is a file, or a folder that is not empty.
        OSError: it can't be written.
    """
    # A link keeps pointing where it did.
    out = Path(os.path.realpath(out))
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not replace)):
        what = "is not empty" if out.is_dir() else "is not a folder"
        raise FileExistsError(17, f"{what}; name a new folder", str(out))
    out.parent.mkdir(parents=True, exist_ok=True)
    staged = Path(tempfile.mkdtemp(prefix=_prefix(out), dir=out.parent))
    try:
        if out.is_dir() and not os.access(out, os.W_OK | os.X_OK):
            raise PermissionError(13, "Permission denied", str(out))
        yield staged
        umask = os.umask(0)
        os.umask(umask)
        staged.chmod(0o777 & ~umask)
        written = {}
        for file in sorted(staged.rglob("*")):
            if file.is_file():
                # safetensors makes files that nobody else may read, whatever the user's umask.
                file.chmod(0o666 & ~umask)
                with open(file, "rb") as handle:
                    digest = hashlib.file_digest(handle, "sha256").hexdigest()
                    os.fsync(handle.fileno())
                name = file.relative_to(staged).as_posix()
                written[name] = {"bytes": file.stat().st_size, "sha256": digest}
        marker = json.dumps({"files": written}, indent=1).encode()
        write_atomically(staged / MARKER, marker)
        if not out.exists() or not any(out.iterdir()):
            os.replace(staged, out)
        else:
            (out / MARKER).unlink(missing_ok=True)
            for entry in sorted(staged.iterdir(), key=lambda entry: entry.name == MARKER):
                _replace(entry, out / entry.name, staged)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _replace(new: Path, old: Path, aside: Path) -> None:
    """Moves `new` to `old`; what was there goes into the folder `aside`, which is then deleted."""
    if old.is_dir() and not old.is_symlink():
        os.rename(old, aside / f"{_prefix(old)}{secrets.token_hex(8)}.old")
    elif new.is_dir():
        old.unlink(missing_ok=True)
    os.replace(new, old)
