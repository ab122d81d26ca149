"""Removes concepts from text-to-image diffusion models: RealEra's neighbor-concept mining."""

from importlib.metadata import version as _version

from realera_fast.config import EraseConfig
from realera_fast.eraser import erase
from realera_fast.erasure import Erasure
from realera_fast.text import Concept
from realera_fast.unet import fuse, unfuse

__version__ = _version("realera_fast")
__all__ = ["Concept", "EraseConfig", "Erasure", "__version__", "erase", "fuse", "unfuse"]
