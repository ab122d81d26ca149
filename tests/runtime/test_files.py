"""Files are whole or absent."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from realera_fast.runtime import folder_atomically, read_json, write_atomically
from realera_fast.runtime.files import MARKER


def test_a_file_is_whole_or_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(OSError, match="No space left"):
            write_atomically(path, b"new ", b"and longer")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
    write_atomically(str(path), b"new ", memoryview(b"parts"))
    assert path.read_bytes() == b"new parts"


def test_a_missing_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_atomically(tmp_path / "none" / "file", b"x")


def test_a_link_keeps_pointing_where_it_did(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for name in ("folder/there", "folder/not yet"):
        link = tmp_path / "link"
        link.symlink_to(name)
        write_atomically(link, b"old")
        write_atomically(link, b"new")
        assert link.is_symlink() and (tmp_path / name).read_bytes() == b"new"
        link.unlink()
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(OSError, match="loop"):
        write_atomically(tmp_path / "loop", b"x")


def test_what_is_no_regular_file_stays(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("pipe")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
        kinds = {p: stat.S_IFMT(p.lstat().st_mode) for p in tmp_path.iterdir()}
        for path in (*kinds, Path("/dev/null"), Path("/dev/full")):
            before = path.lstat()
            with pytest.raises(OSError, match="name a"):
                write_atomically(path, b"x")
            after = path.lstat()
            assert (before.st_ino, before.st_mode) == (after.st_ino, after.st_mode)
            with pytest.raises(FileExistsError), folder_atomically(path, replace=False):
                if path.name == "folder":
                    raise FileExistsError  # an empty folder may become one
        assert {p: stat.S_IFMT(p.lstat().st_mode) for p in tmp_path.iterdir()} == kinds


@pytest.mark.skipif(not Path("/dev/stdout").exists(), reason="no /dev/stdout")
@pytest.mark.parametrize("to", ["file", "pipe"])
def test_the_output_of_the_program_is_not_replaced(tmp_path: Path, to: str) -> None:
    code = (
        "from realera_fast.runtime.files import write_atomically\n"
        "print('before', flush=True)\n"
        "try:\n    write_atomically('/dev/stdout', b'x')\n"
        "except OSError as error:\n    print(error.strerror)"
    )
    if to == "pipe":
        told = subprocess.run([sys.executable, "-c", code], capture_output=True).stdout
    else:
        with open(tmp_path / "out", "wb") as file:
            subprocess.run([sys.executable, "-c", code], stdout=file, check=True)
        told = (tmp_path / "out").read_bytes()
    before, _, after = told.decode().partition("\n")
    assert before == "before" and "name a" in after


@pytest.mark.parametrize("name", ["x" * 255, "\u5154" * 85, "a\nb", "caf\udce9", "-rf", "'\""])
def test_a_name_may_be_as_long_and_odd_as_the_system_allows(tmp_path: Path, name: str) -> None:
    write_atomically(tmp_path / name, b"old")
    write_atomically(tmp_path / name, b"new")
    assert (tmp_path / name).read_bytes() == b"new"
    (tmp_path / name).unlink()
    for _ in range(2):
        with folder_atomically(tmp_path / name, replace=True) as staged:
            (staged / name).mkdir()
            (staged / name / name).write_bytes(b"x")
        assert (tmp_path / name / name / name).read_bytes() == b"x"
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_a_link_to_a_folder_is_written_through(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for name in ("folder", "not yet"):
        (tmp_path / "link").symlink_to(name)
        with folder_atomically(tmp_path / "link") as staged:
            (staged / "file").write_bytes(b"x")
        assert (tmp_path / "link").is_symlink()
        assert sorted(p.name for p in (tmp_path / name).iterdir()) == [MARKER, "file"]
        (tmp_path / "link").unlink()


def test_json_means_one_thing() -> None:
    assert read_json(b'\xef\xbb\xbf{"a": [1, null]}') == read_json('{"a": [1, null]}')
    for text in ('{"a": 1, "a": 1}', '[{"b": {"a": 1, "b": 2, "a": 3}}]'):
        with pytest.raises(ValueError, match="names the field 'a' twice"):
            read_json(text)
    for constant in ("NaN", "Infinity", "-Infinity"):
        with pytest.raises(ValueError, match=f"holds {constant}"):
            read_json(f"[{constant}]")
        assert repr(read_json(f"[{constant}]", constants=True)) in ("[nan]", "[inf]", "[-inf]")
