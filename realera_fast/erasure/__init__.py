"""What erasing returns: undo, history, file format, exports and report."""

from realera_fast.erasure import report
from realera_fast.erasure.describe import read_description
from realera_fast.erasure.erasure import Erasure, applied, history_of
from realera_fast.erasure.file import ErasureFileError
from realera_fast.erasure.history import BaseModelMismatchError

__all__ = [
    "BaseModelMismatchError",
    "Erasure",
    "ErasureFileError",
    "applied",
    "history_of",
    "read_description",
    "report",
]
