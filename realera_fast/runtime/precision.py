"""16-bit dtypes on a CPU: whether it multiplies them natively, and a warning where it does not."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

_HALF = (torch.bfloat16, torch.float16)


def multiplies_natively(dtype: torch.dtype) -> bool:
    """Whether this CPU has instructions that multiply numbers of a dtype, and torch uses them.

    Where it has none, torch leaves bfloat16 and float16 to plain loops: with AVX2 alone a square
    product in bfloat16 took 16, 22 and 47 times as long as in float32 at 256, 512 and 1024 rows
    (torch 2.13, one thread).
    """
    if dtype not in _HALF:
        return True
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    # Torch says so of every AVX-512, where oneDNN may have to widen bfloat16. What has AMX for it
    # has this too.
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    return not x86 or torch.cpu._is_avx512_bf16_supported()


def fastest_dtype(device: torch.device | str) -> torch.dtype:
    """bfloat16, but float32 on a CPU that does not multiply bfloat16 natively."""
    slow = torch.device(device).type == "cpu" and not multiplies_natively(torch.bfloat16)
    return torch.float32 if slow else torch.bfloat16


def cpu_warnings(modules: Iterable[Any], *, autocast: bool = False) -> tuple[str, ...]:
    """Says what it costs to compute in a 16-bit dtype on a CPU that does not multiply it natively.

    Args:
        modules: models; anything else among them is passed over.
        autocast: whether float32 models compute in bfloat16.

    Returns:
        One sentence, or none.
    """
    found: set[torch.dtype] = set()
    for module in modules:
        if isinstance(module, nn.Module):
            on_cpu = (x for x in module.parameters() if x.device.type == "cpu")
            found.update(x.dtype for x in on_cpu)
    if autocast and torch.float32 in found:
        found.add(torch.bfloat16)
    slow = [dtype for dtype in _HALF if dtype in found and not multiplies_natively(dtype)]
    if not slow:
        return ()
    names = " and ".join(str(dtype).removeprefix("torch.") for dtype in slow)
    return (
        f"{names} on a CPU that does not multiply it natively: large matrix products take 16 to "
        "47 times as long as in float32, or more; use float32 (pipe.to(torch.float32), --dtype "
        'fp32, AlignmentConfig.mixed_precision="no") or a GPU',
    )
