"""Detectors as users name them on the command line, by module and function."""

from __future__ import annotations

from PIL.Image import Image


def brightness(picture: Image) -> str:
    """Says of a picture whether it is black."""
    return "bright" if sum(picture.convert("L").get_flattened_data()) > 0 else "dark"
