"""Writes docs/cli.md from the commands themselves.

python tools/cli_page.py            # docs/cli.md
python tools/cli_page.py --check    # exit 1 if docs/cli.md is not what the commands say
"""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path
from typing import Any

import typer

from realera_fast.cli import app

PAGE = Path(__file__).resolve().parents[1] / "docs" / "cli.md"

HEAD = """\
# Command line

Made by `tools/cli_page.py` from the commands; `realera-fast COMMAND --help` prints the same.

Results go to stdout, progress and messages to stderr. Exit codes: 0 done, 1 failed (one line that
begins with `error:`; `--debug` shows the traceback), 2 wrong usage, 130 interrupted.
"""


def page() -> str:
    """The whole page."""
    root: Any = typer.main.get_command(app)
    parts = [HEAD, _described(root)]
    for name, command in root.commands.items():
        parts += [f"## realera-fast {name}\n", _usage(name, command), _described(command)]
        parts += [_table("argument", command, "argument"), _table("option", command, "option")]
    return "\n".join(part for part in parts if part)


def _usage(name: str, command: Any) -> str:
    words = [
        parameter.metavar or parameter.name.upper()
        for parameter in command.params
        if parameter.param_type_name == "argument"
    ]
    required = [
        f"{parameter.opts[0]} {parameter.metavar}"
        for parameter in command.params
        if parameter.param_type_name == "option" and parameter.required
    ]
    line = " ".join(["realera-fast", name, *words, *required, "[OPTIONS]"])
    return f"```\n{line}\n```\n"


def _described(command: Any) -> str:
    """The command's own text; blocks that keep their lines become code."""
    lines: list[str] = []
    for block in re.split(r"\n\s*\n", inspect.cleandoc(command.help or "")):
        kept = block.startswith("\b")
        text = block.removeprefix("\b").strip("\n")
        if not kept:
            lines += [_plain(" ".join(text.split())), ""]
            continue
        title, *rest = text.splitlines()
        language = "sh" if title.startswith("Examples") else ""
        code = inspect.cleandoc("\n".join(["", *rest]))
        lines += [title, "", f"```{language}", code, "```", ""]
    return "\n".join(lines)


def _table(title: str, command: Any, kind: str) -> str:
    rows = []
    for parameter in command.params:
        if parameter.param_type_name != kind or getattr(parameter, "hidden", False):
            continue
        if kind == "argument":
            names = f"`{parameter.metavar or parameter.name}`"
        else:
            value = "" if parameter.is_flag else f" {parameter.metavar or 'VALUE'}"
            names = ", ".join(f"`{name}{value}`" for name in parameter.opts)
        rows.append(
            f"| {_cell(names)} | {_cell(_plain(parameter.help or ''))}{_default(parameter)} |"
        )
    return "\n".join([f"| {title} | |", "|---|---|", *rows, ""]) if rows else ""


def _default(parameter: Any) -> str:
    if parameter.required or parameter.default in (None, False, (), []):
        return " Required." if parameter.required and parameter.param_type_name == "option" else ""
    return f" Default: `{parameter.default}`."


def _plain(text: str) -> str:
    """Angle brackets and stars as they are."""
    return re.sub(r"([<>*])", r"\\\1", text)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def main(arguments: list[str]) -> int:
    """Writes the page, or says whether it is up to date."""
    text = page()
    if arguments == ["--check"]:
        return int(PAGE.read_text(encoding="utf-8") != text)
    PAGE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
