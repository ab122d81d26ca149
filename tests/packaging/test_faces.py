"""What the rooms' faces offer: somebody needs each name, and errors can be caught by name."""

from __future__ import annotations

import ast
import builtins
import importlib
import inspect
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import realera_fast
from realera_fast import ops

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "realera_fast"
FACES = {
    path.parent.name: importlib.import_module(f"realera_fast.{path.parent.name}")
    for path in sorted(PACKAGE.glob("*/__init__.py"))
}


def offered(face: ModuleType) -> Iterator[tuple[str, Any]]:
    """Functions, classes, their methods, and what modules that a face names hold themselves."""
    for name in face.__all__:
        thing = getattr(face, name)
        yield name, thing
        if inspect.isclass(thing) or inspect.ismodule(thing):
            for part, value in vars(thing).items():
                ours = inspect.isclass(thing) or getattr(value, "__module__", "") == thing.__name__
                if ours and not part.startswith("_"):
                    yield f"{name}.{part}", value


def errors_told(docstring: str) -> set[str]:
    """Names before the colons of a docstring's "Raises" section."""
    section = re.search(r"^Raises:\n((?:[ ]+.*\n?|\n)*)", inspect.cleandoc(docstring), re.MULTILINE)
    entries = re.findall(r"^ {4}(\w[\w., ]*):", section[1], re.MULTILINE) if section else []
    return {name.strip() for entry in entries for name in entry.split(",")}


def test_errors_told_are_found() -> None:
    assert errors_told(realera_fast.erase.__doc__ or "") == {
        "ValueError",
        "TypeError",
        "CheckpointError",
    }


@pytest.mark.parametrize("face", [realera_fast, *FACES.values()], ids=lambda face: face.__name__)
def test_an_error_that_is_told_can_be_imported(face: ModuleType) -> None:
    names = {name for room in FACES.values() for name in room.__all__} | set(dir(builtins))
    for name, thing in offered(face):
        assert not errors_told(getattr(thing, "__doc__", None) or "") - names, name


@cache
def users() -> dict[tuple[str, str], set[str]]:
    """Files that take a name from the face of a room, by room and name; a room's own left out."""
    found: dict[tuple[str, str], set[str]] = {}
    folders = ("realera_fast", "kernels", "bench", "tests", "tools")
    for path in (path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))):
        place = path.relative_to(ROOT).parts
        own = place[1] if place[0] in ("realera_fast", "tests") and len(place) > 2 else ""
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            taken: list[tuple[str, str]] = []
            if isinstance(node, ast.ImportFrom) and node.module:
                room = node.module.removeprefix("realera_fast.")
                taken = [(room, alias.name) for alias in node.names]
            elif isinstance(node, ast.Attribute):
                room = ast.unparse(node.value).rpartition(".")[2]
                taken = [(room, node.attr)]
            for room, name in taken:
                if room in FACES and room != own:
                    found.setdefault((room, name), set()).add("/".join(place))
    return found


@cache
def documented() -> set[str]:
    """Words of the code in README and docs."""
    texts = [path.read_text(encoding="utf-8") for path in (ROOT / "docs").rglob("*.md")]
    texts.append((ROOT / "README.md").read_text(encoding="utf-8"))
    code = [part for text in texts for part in re.findall(r"```.*?```|`[^`\n]+`", text, re.DOTALL)]
    return set(re.findall(r"\w+", " ".join(code)))


def annotated(room: str) -> set[str]:
    """Words of the annotations in a room: whoever calls a function meets these types."""
    words: set[str] = set()
    for path in (PACKAGE / room).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                marks = [node.returns, *(a.annotation for a in node.args.args)]
            else:
                marks = [node.annotation] if isinstance(node, ast.AnnAssign) else []
            words.update(w for m in marks if m for w in re.findall(r"\w+", ast.unparse(m)))
    return words


@pytest.mark.parametrize("room", FACES)
def test_somebody_needs_each_name(room: str) -> None:
    """A room and the tests of it can name its modules: they alone need no face."""
    needed = documented() | annotated(room) | set(ops.implementations())
    for name in FACES[room].__all__:
        thing = getattr(FACES[room], name)
        error = inspect.isclass(thing) and issubclass(thing, Exception)
        assert error or name in needed or (room, name) in users(), f"{room}.{name}: drop it"
