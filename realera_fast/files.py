"""Files and folders that are complete or absent."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

MARKER = "complete.json"
"""Written last into a folder: sizes and SHA-256 of its files. Without it the folder is a part."""


def write_atomically(path: str | Path, *chunks: bytes | memoryview) -> None:
    """Writes a file so that a reader sees the old one or the whole new one, never a part.

    Args:
        path: the file; its folder must exist.
        chunks: its contents, one after the other.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name[:100]}.{secrets.token_hex(8)}.tmp")
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
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not replace)):
        what = "is not empty" if out.is_dir() else "is a file"
        raise FileExistsError(17, f"{what}; name a new folder", str(out))
    out.parent.mkdir(parents=True, exist_ok=True)
    staged = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
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
        os.rename(old, aside / f".old.{old.name}")
    elif new.is_dir():
        old.unlink(missing_ok=True)
    os.replace(new, old)
