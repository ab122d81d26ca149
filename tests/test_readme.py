"""README's Python blocks run, in order and in one namespace, as a reader would paste them."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
from tiny_models import tiny_pipeline

import realera_fast
from realera_fast import EraseConfig
from realera_fast.training import AlignmentConfig

README = Path(__file__).parent.parent / "README.md"

SHORT = EraseConfig(
    alignment=AlignmentConfig(
        steps=2,
        batch_size=2,
        trajectories=2,
        sampling_steps=2,
        check_seeds=1,
        check_sampling_steps=2,
    )
)
"""The defaults, but for how long alignment takes."""

BLOCK = re.compile(r"^```python[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks() -> list[tuple[int, str]]:
    """(line, code) of every Python block."""
    text = README.read_text(encoding="utf-8")
    return [(text[: match.start()].count("\n") + 2, match[1]) for match in BLOCK.finditer(text)]


def test_python_blocks_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A checkpoint of gigabytes is stood in for by the tiny one, and training stops at once."""
    found = blocks()
    assert found, "README has no Python block"
    import diffusers

    def from_pretrained(*_: Any, **__: Any) -> Any:
        return tiny_pipeline()

    for name in ("DiffusionPipeline", "StableDiffusionPipeline"):
        monkeypatch.setattr(getattr(diffusers, name), "from_pretrained", from_pretrained)
    # A machine of the README's reader has a GPU; this one may not.
    monkeypatch.setattr("diffusers.DiffusionPipeline.to", lambda self, *_, **__: self)

    def erase(*arguments: Any, config: EraseConfig | None = None, **options: Any) -> Any:
        return original(*arguments, config=config or SHORT, **options)

    original = realera_fast.erase
    monkeypatch.setattr(realera_fast, "erase", erase)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for line, code in found:
        # The line number is the README's own, so that a traceback points into it.
        exec(compile("\n" * (line - 1) + code, str(README), "exec"), namespace)


def test_shell_commands_exist() -> None:
    """Every `realera-fast COMMAND` and `make TARGET` that README names is there."""
    from realera_fast import cli

    text = README.read_text(encoding="utf-8")
    commands = {
        command.name or command.callback.__name__ for command in cli.app.registered_commands
    }  # type: ignore[union-attr]
    named = re.findall(r"^\s*realera-fast ([a-z]+)", text, re.MULTILINE)
    assert {"erase", "verify"} <= set(named) <= commands
    makefile = (README.parent / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"^\s*make ([a-z-]+)", text, re.MULTILINE)
    assert {"demo", "test"} <= set(targets)
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_links_point_at_files() -> None:
    text = README.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", text)
    assert {"docs/quality.md", "docs/states.md"} <= set(links)
    for link in links:
        if not re.match(r"[a-z]+:", link):
            assert os.path.exists(README.parent / link), link
