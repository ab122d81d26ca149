"""The command line: one module a command."""

from realera_fast.cli.app import app, main

__all__ = ["app", "main"]
