"""The command line: one module a command. No module here imports torch before a command runs."""

from realera_fast.cli import apply, demo, erase, info, verify  # noqa: F401
from realera_fast.cli.program import app, main

__all__ = ["app", "main"]
