"""A kernel is believed after it has agreed with the definition of its operation.

On the first use of an operation on a device a small fixed case (`trials`) goes through the kernel
and through plain PyTorch. A kernel that raises, or errs by more than `tolerance.limits` allows, is
taken out of torch's dispatcher, with a warning: plain PyTorch serves the operation there, in all
dtypes. Later processes know what was found (`verdicts`), except what a kernel raised: that may
pass, and is tried again. A kernel that never returns, or ends the process, is not caught.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable

import torch

from realera_fast.ops import registry, trials, verdicts
from realera_fast.ops.verdicts import Verdict

logger = logging.getLogger("realera_fast")

_judged: set[tuple[str, torch.device, torch.dtype]] = set()
"""What `believe` need not look at again."""
_found: dict[tuple[str, str, str], Verdict] = {}
"""Verdicts of this process, by operation, device and dtype."""
_unchecked: set[tuple[str, str, str]] = set()
"""Those that plain PyTorch itself can't do here, so that there is nothing to compare with."""
_lock = threading.RLock()


def _renew_lock() -> None:
    global _lock
    _lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    # The thread that held the lock is not in the child, where nobody would release it.
    os.register_at_fork(after_in_child=_renew_lock)


# A graph that is traced holds no check: it is made while the graph is.
@torch.compiler.assume_constant_result
def believe(name: str, device: torch.device, dtype: torch.dtype) -> None:
    """Makes sure that what serves an operation agrees with its definition; call it before the op.

    Args:
        name: the operation; those that it is written of are looked at too.
        device, dtype: of its rows, embeddings or weights.

    Raises:
        RuntimeError: a kernel has left the device unusable.
    """
    if (name, device, dtype) not in _judged:
        _first_use(name, device, dtype)


def check_kernels() -> list[Verdict]:
    """Holds every kernel against its definition again, on every device that there is.

    What was found before, in this process or an earlier one, is replaced: a kernel that now agrees
    serves again.

    Returns:
        A verdict for each kernel, device and dtype.
    """
    devices = [torch.device("cpu")]
    devices += [torch.device("cuda", i) for i in range(_gpus())]
    with _lock:
        for known in (_judged, _found, _unchecked):
            known.clear()
        for op in registry.OPS:
            for device in devices:
                registry.serve_kernel(op.name, device.type)
        for op in registry.OPS:
            _check_everywhere(op, devices)
        return list(_found.values())


def distrusted() -> dict[str, str]:
    """The kernels that plain PyTorch stands in for, and why: for provenance."""
    with _lock:
        return {
            f"{verdict.op} on {verdict.device}, {verdict.dtype}": verdict.what_differed()
            for verdict in _found.values()
            if not verdict.agrees
        }


def _gpus() -> int:
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _check_everywhere(op: registry.Op, devices: list[torch.device]) -> None:
    """Judges a kernel on all devices and in all dtypes, and only then replaces it."""
    found: list[Verdict] = []
    try:
        for device in devices:
            if not registry.has_kernel(op.name, device.type):
                continue
            for dtype in trials.dtypes_of(op.name):
                verdict = _aside(lambda: _judge(op, device, dtype))  # noqa: B023
                if verdict is not None:
                    found.append(verdict)
                    _remember(device, verdict)
    finally:
        for verdict in found:
            _enact(verdict)


def _first_use(name: str, device: torch.device, dtype: torch.dtype) -> None:
    if device.type == "cuda" and (_gpus() == 0 or torch.cuda.is_current_stream_capturing()):
        # No GPU: tensors of shapes alone. In a graph nothing may wait for a result.
        return
    with _lock:
        settled = all(
            [
                _settled(each, device, dtype)
                for each in registry.parts_of(name)
                if registry.has_kernel(each, device.type)
            ]
        )
        if settled:
            _judged.add((name, device, dtype))


def _settled(name: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a kernel has been judged, now or before."""
    key = (name, str(device), _short(dtype))
    if key in _found or key in _unchecked:
        return True
    if registry.is_overridden(name, device.type):
        # Of another dtype or device: there is no kernel left to judge.
        return True
    verdict = verdicts.remembered(device).get((name, _short(dtype)))
    if verdict is None:
        op = next(op for op in registry.OPS if op.name == name)
        verdict = _aside(lambda: _judge(op, device, dtype))
        if verdict is None:
            return key in _unchecked
        _remember(device, verdict)
    _enact(verdict)
    return True


def _remember(device: torch.device, verdict: Verdict) -> None:
    """Tells later processes, unless the kernel raised on a device that lives on."""
    if verdict.fault:
        verdicts.remember(device, [], forget=[verdict])
    else:
        verdicts.remember(device, [verdict])


def _enact(verdict: Verdict) -> None:
    """Takes a verdict over: what does not agree no longer serves."""
    _found[verdict.op, verdict.device, verdict.dtype] = verdict
    if verdict.agrees:
        return
    kind = torch.device(verdict.device).type
    registry.serve_reference(verdict.op, kind)
    logger.warning(
        "the %s kernel of %s on %s (%s) %s: plain PyTorch serves %s on %s devices instead, "
        "which is slower; `realera-fast info --check` tries every kernel again",
        verdict.implementation,
        verdict.op,
        verdict.device,
        verdict.dtype,
        verdict.what_differed(),
        verdict.op,
        kind,
    )


def _judge(op: registry.Op, device: torch.device, dtype: torch.dtype) -> Verdict | None:
    """Runs the cases of an operation; None where that can't be done.

    Without memory it is tried again. Where plain PyTorch fails, as in a mode that forbids what it
    does, the kernel serves unchecked.
    """
    start = time.perf_counter()
    kernel = getattr(torch.ops.realera_fast, op.name).default
    worst, fault = trials.Distance(0.0, 0.0), ""
    for trial in trials.trials(op.name, dtype, device):
        try:
            plain = trials.run(op.plain, trial, device)
        except torch.OutOfMemoryError:
            return None
        except Exception as error:
            _unchecked.add((op.name, str(device), _short(dtype)))
            logger.warning(
                "the kernel of %s on %s (%s) serves unchecked, as plain PyTorch fails: %s",
                op.name,
                device,
                _short(dtype),
                _said(error),
            )
            return None
        try:
            found = trials.distance(trial, trials.run(kernel, trial, device), plain)
        except torch.OutOfMemoryError:
            return None
        except Exception as error:
            fault = _said(error)
            break
        worst = max(worst, found, key=lambda each: (each.share, each.limit))
    verdict = Verdict(
        op=op.name,
        device=str(device),
        dtype=_short(dtype),
        implementation=registry.implementations()[op.name][device.type],
        error=worst.error,
        limit=worst.limit,
        milliseconds=1e3 * (time.perf_counter() - start),
        fault=fault,
    )
    if fault:
        _check_alive(op, trial, verdict)
    return verdict


def _check_alive(op: registry.Op, trial: trials.Trial, verdict: Verdict) -> None:
    """Refuses to go on with a device that a kernel has broken, which the next process can."""
    device = torch.device(verdict.device)
    try:
        trials.run(op.plain, trial, device)
    except Exception as error:
        verdicts.remember(device, [verdict])
        raise RuntimeError(
            f"the kernel of {op.name} {verdict.what_differed()}, and {device} answers nothing "
            "since; start the program again: plain PyTorch will serve this operation there"
        ) from error


def _said(error: BaseException) -> str:
    """The first line of an error, which may be long."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:300]}"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _aside(work: Callable[[], Verdict | None]) -> Verdict | None:
    """Runs `work` in a thread of its own: the caller's modes of PyTorch are not in force there.

    They are kept by thread: autocast, inference, tracing, what stands for tensors of shapes alone,
    default devices and streams.
    """
    found: list[Verdict | None] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            with torch.no_grad():
                found.append(work())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="realera_fast kernel check")
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return found[0]
