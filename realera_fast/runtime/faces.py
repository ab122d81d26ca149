"""Faces of rooms that wait with torch, which takes seconds to import, until somebody needs it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib import import_module


def on_demand(face: str, homes: Mapping[str, tuple[str, ...]]) -> Callable[[str], object]:
    """The `__getattr__` of a face whose names are imported when they are first asked for.

    Args:
        face: its module's name.
        homes: modules beside the face and the names that each has; a module's own name is the
            module.
    """
    home_of = {name: home for home, names in homes.items() for name in names}

    def __getattr__(name: str) -> object:
        if name not in home_of:
            raise AttributeError(f"module {face!r} has no attribute {name!r}")
        home = import_module(f"{face}.{home_of[name]}")
        value = home if name == home_of[name] else getattr(home, name)
        setattr(sys.modules[face], name, value)
        return value

    return __getattr__
