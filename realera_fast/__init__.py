"""Removes concepts from text-to-image diffusion models: RealEra's neighbor-concept mining."""

from importlib import import_module as _import_module
from importlib.metadata import version as _version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from realera_fast.config import EraseConfig
    from realera_fast.dry_run import preview
    from realera_fast.eraser import erase
    from realera_fast.erasure import Erasure
    from realera_fast.guarding import guard
    from realera_fast.text import Concept
    from realera_fast.unet import fuse, unfuse

__version__ = _version("realera_fast")
__all__ = [
    "Concept",
    "EraseConfig",
    "Erasure",
    "__version__",
    "erase",
    "fuse",
    "guard",
    "preview",
    "unfuse",
]

_HOMES = {
    "Concept": "text",
    "EraseConfig": "config",
    "Erasure": "erasure",
    "erase": "eraser",
    "fuse": "unet",
    "guard": "guarding",
    "preview": "dry_run",
    "unfuse": "unet",
}
_ROOMS = (
    *("runtime", "ops", "solver", "text", "models", "erasure", "unet", "transformer", "mining"),
    *("alignment", "eraser", "evaluation", "embedded", "cli"),
)


def __getattr__(name: str) -> object:
    # On demand, as importing torch takes seconds, which `realera-fast --help` need not wait for.
    if name in _HOMES:
        value = getattr(_import_module(f"realera_fast.{_HOMES[name]}"), name)
        globals()[name] = value
        return value
    if name in _ROOMS:
        return _import_module(f"realera_fast.{name}")
    raise AttributeError(f"module 'realera_fast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES, *_ROOMS})
