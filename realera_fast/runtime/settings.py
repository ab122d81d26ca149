"""What the fields of every class of settings may hold: values that JSON has."""

from __future__ import annotations

import math
import typing
from types import UnionType
from typing import Any

_SAID = {bool: "True or False", int: "an integer", float: "a number", str: "a string"}


def check_types(settings: Any) -> None:
    """Makes sure that a dataclass's fields hold what their annotations say; numbers become plain.

    Those of NumPy and PyTorch become Python's own: JSON, which they are saved as, has no others.
    Fields of several values, such as tuples, are left to their class.

    Raises:
        TypeError: a value of another type.
    """
    for name, hint in typing.get_type_hints(type(settings)).items():
        value = getattr(settings, name)
        if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
            value = value.item()
            object.__setattr__(settings, name, value)
        kinds = typing.get_args(hint) if isinstance(hint, UnionType) else (hint,)
        if typing.get_origin(hint) is typing.Literal:
            kinds = tuple({type(choice) for choice in typing.get_args(hint)})
        if not all(isinstance(kind, type) for kind in kinds):
            continue
        taken = (*kinds, int) if float in kinds else kinds
        if not isinstance(value, taken) or (isinstance(value, bool) and bool not in kinds):
            expected = " or ".join(
                "None" if kind is type(None) else _SAID.get(kind, f"a {kind.__name__}")
                for kind in kinds
            )
            raise TypeError(
                f"{type(settings).__name__}.{name} must be {expected}, got {value!r} "
                f"({type(value).__name__})"
            )


def check_scale(value: float | str, name: str) -> None:
    """Makes sure that a scale is a number that can be one, or left to the library.

    Raises:
        ValueError: it is neither finite and at least 0 nor "auto".
    """
    if value != "auto" if isinstance(value, str) else not 0.0 <= value < math.inf:
        raise ValueError(f'{name} must be finite and at least 0, or "auto", got {value!r}')
