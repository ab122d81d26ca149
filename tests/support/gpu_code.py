"""Limits of GPUs, and what the compiler made for them.

Only for tests in `tests/aot`: importing it imports Triton.
"""

from __future__ import annotations

import re
import subprocess
from typing import Any

import triton

SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Most shared memory of a block, in bytes (CUDA programming guide, compute capabilities)."""
MULTIPROCESSOR = 64 * 1024
"""Registers that the programs on a multiprocessor share."""


def resources(binary: bytes, folder: Any) -> dict[str, int]:
    """Registers, stack and local memory per thread, as the assembler wrote them into the binary."""
    path = folder / "kernel.cubin"
    path.write_bytes(binary)
    text = subprocess.run(
        [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    found = {name: int(value) for name, value in re.findall(r"\b([A-Z]+):(\d+)", text)}
    assert {"REG", "STACK", "LOCAL"} <= found.keys(), text
    return found


def machine_code(folder: Any) -> str:
    """Of the binary that `resources` wrote."""
    return subprocess.run(
        [triton.knobs.nvidia.nvdisasm.path, "-c", str(folder / "kernel.cubin")],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
