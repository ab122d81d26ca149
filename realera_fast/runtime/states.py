"""What a caller may have switched on around a call, and who else may be working on the same model.

Weights have to come out the same wherever a call stands: deltas are recognized by hashes of what
they were made on. So every public entry runs as PyTorch does by default (`ordinary`), and those
that read or change a model run one after the other (`exclusive`). The default dtype is not touched,
as other threads load models under one of their own: every tensor that is made here names its dtype.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, ParamSpec, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import nn

from realera_fast.runtime.wrappers import unwrapped

P = ParamSpec("P")
R = TypeVar("R")

_AUTOCAST = ("cpu", "cuda", "xpu", "mps", "hpu", "mtia", "xla", "ipu", "maia", "privateuseone")
"""Device types that PyTorch has an autocast for."""


@contextmanager
def full_precision() -> Iterator[None]:
    """Operations run in the dtype of their operands: no autocast, whatever the device."""
    active = [kind for kind in _AUTOCAST if torch.is_autocast_enabled(kind)]
    with ExitStack() as stack:
        for kind in active:
            stack.enter_context(torch.autocast(kind, enabled=False))
        try:
            yield
        finally:
            if active:
                # It holds copies of weights as they were before.
                torch.clear_autocast_cache()


_backends: Any = torch.backends


class _ExactProducts:
    """float32 products are those of float32, for as long as anyone here asks for it.

    The setting is the process's: the first one in notes it, the last one out puts it back.
    """

    def __init__(self) -> None:
        self._lock, self._users = threading.Lock(), 0
        self._former: tuple[str | None, list[str]] | None = None

    @contextmanager
    def __call__(self) -> Iterator[None]:
        with self._lock:
            if not self._users:
                self._former = self._lowered()
                if self._former is not None:
                    torch.set_float32_matmul_precision("highest")
            self._users += 1
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                if not self._users and self._former is not None:
                    general, own = self._former
                    if general is not None:
                        torch.set_float32_matmul_precision(general)
                    for backend, value in zip(self._backends(), own, strict=True):
                        backend.fp32_precision = value

    def _lowered(self) -> tuple[str | None, list[str]] | None:
        """The settings as they are; None where they are exact already."""
        own = [backend.fp32_precision for backend in self._backends()]
        try:
            general = torch.get_float32_matmul_precision()
        except RuntimeError:
            # Refused where both ways of setting it were used: then the backends alone count.
            general = None
        exact = {*own, _backends.fp32_precision} <= {"none", "ieee"}
        return None if exact and general == "highest" else (general, own)

    def _backends(self) -> tuple[Any, Any]:
        return _backends.cuda.matmul, _backends.mkldnn.matmul


_exact_products = _ExactProducts()


@contextmanager
def ordinary() -> Iterator[None]:
    """PyTorch as it is by default, in this thread and whatever the caller has switched on.

    No inference mode, gradients enabled, no autocast, tensors on the CPU unless told otherwise,
    float32 products not lowered. Also a decorator: ``@ordinary()``.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(full_precision())
        stack.enter_context(_exact_products())
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        yield


@contextmanager
def uncompiled(module: nn.Module) -> Iterator[None]:
    """What is compiled in place runs as it is written: compilers round in ways of their own."""
    compiled = [(m, m._compiled_call_impl) for m in module.modules() if m._compiled_call_impl]
    try:
        for part, _ in compiled:
            part._compiled_call_impl = None
        yield
    finally:
        for part, call in compiled:
            part._compiled_call_impl = call


_locks: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()
"""Not attributes of the modules, which are copied and pickled."""
_new_lock = threading.Lock()


@contextmanager
def locked(module: Any) -> Iterator[None]:
    """Alone on a module, among all who ask for it here; its wrappers are the same one.

    A second thread waits, the same thread may come in again. What is no module is nobody's.
    """
    if not isinstance(module, nn.Module):
        yield
        return
    inner = unwrapped(module)
    with _new_lock:
        lock = _locks.setdefault(inner, threading.RLock())
    with lock:
        yield


def alone(function: Callable[P, R]) -> Callable[P, R]:
    """Runs a function alone on the model that its argument is.

    The argument is called ``model`` or ``pipe``: a denoiser, or a pipeline that has one.
    """
    names = list(inspect.signature(function).parameters)
    name = "model" if "model" in names else "pipe"
    place = names.index(name)

    @functools.wraps(function)
    def waiting(*args: P.args, **kwargs: P.kwargs) -> R:
        model: Any = args[place] if len(args) > place else kwargs.get(name)
        if not isinstance(model, nn.Module):
            parts = (getattr(model, part, None) for part in ("unet", "transformer"))
            model = next((part for part in parts if isinstance(part, nn.Module)), None)
        with locked(model):
            return function(*args, **kwargs)

    return waiting


def exclusive(function: Callable[P, R]) -> Callable[P, R]:
    """Runs a function `alone` on its model, as `ordinary`."""
    return alone(ordinary()(function))
