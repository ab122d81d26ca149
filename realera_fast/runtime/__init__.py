"""Files, processes, progress, checkpoints and the states of PyTorch that an edit depends on."""

from typing import TYPE_CHECKING

from realera_fast.runtime.faces import on_demand
from realera_fast.runtime.files import fields_once, folder_atomically, read_json, write_atomically
from realera_fast.runtime.names import (
    clean,
    clean_names,
    composed,
    folded,
    listed,
    script,
    shown,
    valid,
    valid_texts,
)
from realera_fast.runtime.settings import check_scale, check_types

if TYPE_CHECKING:
    from realera_fast.runtime import checkpoint
    from realera_fast.runtime.checkpoint import Checkpoint, CheckpointError
    from realera_fast.runtime.clock import Clock
    from realera_fast.runtime.execution import Execution
    from realera_fast.runtime.precision import cpu_warnings, fastest_dtype, multiplies_natively
    from realera_fast.runtime.processes import Processes
    from realera_fast.runtime.progress import progress_bar
    from realera_fast.runtime.safetensors_file import (
        MAX_HEADER_BYTES,
        NAMES,
        SafetensorsFileError,
        encode_json,
        patch,
        read_header,
        tensor_at,
        tensor_bytes,
        write,
    )
    from realera_fast.runtime.states import (
        alone,
        exclusive,
        full_precision,
        locked,
        ordinary,
        uncompiled,
    )
    from realera_fast.runtime.wrappers import refuse_offloading, unwrapped
else:
    __getattr__ = on_demand(
        __name__,
        {
            "checkpoint": ("checkpoint", "Checkpoint", "CheckpointError"),
            "clock": ("Clock",),
            "execution": ("Execution",),
            "precision": ("cpu_warnings", "fastest_dtype", "multiplies_natively"),
            "processes": ("Processes",),
            "progress": ("progress_bar",),
            "safetensors_file": (
                "MAX_HEADER_BYTES",
                "NAMES",
                "SafetensorsFileError",
                "encode_json",
                "patch",
                "read_header",
                "tensor_at",
                "tensor_bytes",
                "write",
            ),
            "states": ("alone", "exclusive", "full_precision", "locked", "ordinary", "uncompiled"),
            "wrappers": ("refuse_offloading", "unwrapped"),
        },
    )

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "Clock",
    "Execution",
    "MAX_HEADER_BYTES",
    "NAMES",
    "Processes",
    "SafetensorsFileError",
    "alone",
    "check_scale",
    "check_types",
    "checkpoint",
    "clean",
    "clean_names",
    "composed",
    "cpu_warnings",
    "encode_json",
    "exclusive",
    "fastest_dtype",
    "fields_once",
    "folded",
    "folder_atomically",
    "full_precision",
    "listed",
    "locked",
    "multiplies_natively",
    "on_demand",
    "ordinary",
    "patch",
    "progress_bar",
    "read_header",
    "read_json",
    "refuse_offloading",
    "script",
    "shown",
    "tensor_at",
    "tensor_bytes",
    "uncompiled",
    "unwrapped",
    "valid",
    "valid_texts",
    "write",
    "write_atomically",
]
