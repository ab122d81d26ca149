"""What erasing returns: undo, history, file format, exports and report."""

from realera_fast.erasure import report
from realera_fast.erasure.attachment import attached_to, check_alone, check_attachable
from realera_fast.erasure.base_model import BaseModelMismatchError
from realera_fast.erasure.comfyui import comfyui_conditioning, comfyui_model
from realera_fast.erasure.describe import read_description
from realera_fast.erasure.edit import EditedWeights
from realera_fast.erasure.erasure import Erasure
from realera_fast.erasure.file import ErasureFileError
from realera_fast.erasure.history import (
    applied,
    check_extended,
    check_stack,
    history_of,
    originals_of,
    taken_off,
)
from realera_fast.erasure.hub import HubError

__all__ = [
    "BaseModelMismatchError",
    "EditedWeights",
    "Erasure",
    "ErasureFileError",
    "HubError",
    "applied",
    "attached_to",
    "check_alone",
    "check_attachable",
    "check_extended",
    "check_stack",
    "comfyui_conditioning",
    "comfyui_model",
    "history_of",
    "originals_of",
    "read_description",
    "report",
    "taken_off",
]
