"""What was found when kernels were held against their definitions, and where it is remembered.

One file for each device, in the Hugging Face assets cache, beside the preserve prior. Its name is a
hash of everything on which the bits depend: device, driver, torch, Triton, and the library's code.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import logging
import math
import platform
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from realera_fast.runtime import read_json, write_atomically

logger = logging.getLogger("realera_fast")

_ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Verdict:
    """Whether a kernel agreed with the definition of its operation."""

    op: str
    device: str
    """Such as "cuda:1"."""
    dtype: str
    """Such as "bfloat16"."""
    implementation: str
    """Of the kernel: "native" or "triton"."""
    error: float
    """Greatest, in the place where it exceeds the limit most."""
    limit: float
    """What it may be there (`tolerance.limits`)."""
    milliseconds: float
    """That the case took, compilation included."""
    fault: str
    """What the kernel raised; empty if it returned."""

    @property
    def agrees(self) -> bool:
        """Whether the kernel serves."""
        return not self.fault and self.error <= self.limit

    def what_differed(self) -> str:
        """Half a sentence about a kernel that does not agree."""
        if self.fault:
            return f"raised {self.fault}"
        if math.isinf(self.error):
            return "gave NaN, infinity or a wrong shape where its definition does not"
        return f"erred by {self.error:.3g} where at most {self.limit:.3g} is allowed"


def remembered(device: torch.device) -> dict[tuple[str, str], Verdict]:
    """Verdicts of earlier processes about a device, by operation and dtype."""
    path = _path(device)
    if path is None or not path.is_file():
        return {}
    try:
        found = [Verdict(**_checked(entry)) for entry in read_json(path.read_text("utf-8"))]
    except (OSError, ValueError, TypeError) as error:
        logger.warning("kernel checks in %s are unreadable and will be made again: %s", path, error)
        return {}
    # Devices of one kind share a file.
    found = [dataclasses.replace(verdict, device=str(device)) for verdict in found]
    return {(verdict.op, verdict.dtype): verdict for verdict in found}


def remember(
    device: torch.device, verdicts: Iterable[Verdict], forget: Iterable[Verdict] = ()
) -> None:
    """Adds verdicts to those of earlier processes; what can't be written is checked again.

    Args:
        device: the one that they are about.
        verdicts: what later processes rely on.
        forget: of their operations and dtypes nothing is kept.
    """
    path = _path(device)
    if path is None:
        return
    before = remembered(device)
    known = before | {(v.op, v.dtype): v for v in verdicts}
    for verdict in forget:
        known.pop((verdict.op, verdict.dtype), None)
    if known == before:
        return
    # JSON has no infinity.
    entries = [
        {**dataclasses.asdict(v), "error": str(v.error), "limit": str(v.limit)}
        for v in known.values()
    ]
    try:
        write_atomically(path, json.dumps(entries, indent=1).encode())
    except OSError as error:
        logger.info("kernel checks are not remembered in %s: %s", path, error)


def _checked(entry: Any) -> dict[str, Any]:
    """The fields of a verdict in a file."""
    if not isinstance(entry, dict):
        raise ValueError(f"expected an object for each kernel, got {entry!r}")
    fields = dict(entry)
    for name in ("op", "device", "dtype", "implementation", "fault"):
        if not isinstance(fields.get(name), str):
            raise ValueError(f"expected a text for {name}, got {fields.get(name)!r}")
    for name in ("error", "limit", "milliseconds"):
        fields[name] = float(fields.get(name, "missing"))
    return fields


def _path(device: torch.device) -> Path | None:
    from huggingface_hub import cached_assets_path

    key = hashlib.sha256(json.dumps(_circumstances(device)).encode()).hexdigest()
    try:
        return Path(cached_assets_path("realera_fast", "kernel_checks")) / f"{key}.json"
    except OSError as error:
        logger.info("kernel checks are not remembered: %s", error)
        return None


def _circumstances(device: torch.device) -> list[str]:
    """All on which the result of a kernel may depend."""
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = ""
    return [
        *_hardware(device),
        platform.machine(),
        torch.__version__,
        str(torch.version.cuda),
        triton,
        _code_hash(),
    ]


def _hardware(device: torch.device) -> list[str]:
    if device.type != "cuda":
        # Which loops run, ours and those of PyTorch.
        return [device.type, torch.backends.cpu.get_cpu_capability()]
    found = torch.cuda.get_device_properties(device)
    kind = f"{found.name} {found.major}.{found.minor} {found.multi_processor_count}"
    # Windows' Linux has the driver outside.
    driver = Path("/sys/module/nvidia/version")
    return [device.type, kind, driver.read_text().strip() if driver.is_file() else ""]


@functools.cache
def _code_hash() -> str:
    """Of the native library, the kernels, and the definitions that they are held against."""
    found = hashlib.sha256()
    files = [*_ROOT.glob("_C.*"), *_ROOT.glob("kernels/*.py"), *_ROOT.glob("ops/*.py")]
    for path in sorted(files):
        found.update(path.read_bytes())
    return found.hexdigest()
