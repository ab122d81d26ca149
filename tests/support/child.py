"""Python processes that tests start."""

from __future__ import annotations

import os
import sys


def child_environment(**more: str) -> dict[str, str]:
    """The environment in which a process finds the modules that this one finds."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **more}
