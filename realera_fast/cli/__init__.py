"""The command line: one module a command. No module imports torch before a command runs."""

from realera_fast.cli.program import app, main

# isort: off
# Each registers itself; this is the order in which help lists them.
from realera_fast.cli import erase as _erase  # noqa: F401
from realera_fast.cli import apply as _apply  # noqa: F401
from realera_fast.cli import verify as _verify  # noqa: F401
from realera_fast.cli import info as _info  # noqa: F401
from realera_fast.cli import push as _push  # noqa: F401
from realera_fast.cli import demo as _demo  # noqa: F401
# isort: on

__all__ = ["app", "main"]
