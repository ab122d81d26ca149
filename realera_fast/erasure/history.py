"""Which erasures a model carries, in order."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from realera_fast.models import weights_hash
from realera_fast.runtime import unwrapped

if TYPE_CHECKING:
    from realera_fast.erasure.erasure import Erasure


class BaseModelMismatchError(ValueError):
    """The model is not the one the erasure was made for."""


@dataclass(frozen=True, eq=False)
class Application:
    """One edit of one model in this process."""

    erasure: Erasure
    originals: Mapping[str, Tensor]
    """Weights of the edited projections before, on the CPU."""
    before: Mapping[str, str]
    """Hash of every layer that the erasure is about, before."""
    after: Mapping[str, str]
    """The same after."""


histories: WeakKeyDictionary[nn.Module, list[Application]] = WeakKeyDictionary()
"""What was applied to each living model, in order. It is what makes a bit-exact undo possible.

A list belongs to whoever works on its model (`states.exclusive`), the dictionary to all threads."""
history_lock = threading.Lock()


def applications_of(model: nn.Module) -> list[Application]:
    """What was applied to a model, to be read or changed."""
    with history_lock:
        return histories.setdefault(unwrapped(model), [])


def history_entry(erasure: Erasure, action: str = "erased") -> dict[str, Any]:
    """An erasure in the history of another."""
    return {
        "action": action,
        "concepts": [concept.target for concept in erasure.concepts],
        "fingerprint": erasure.fingerprint,
        "seed": erasure.provenance.get("seed"),
        "version": erasure.provenance.get("versions", {}).get("realera_fast"),
    }


class WeightStates:
    """Hashes of a model's layers as they are stored now, each made when first asked for."""

    def __init__(self, model: nn.Module) -> None:
        self._model = unwrapped(model)
        self._found: dict[str, str] = {}

    def of(self, names: Iterable[str]) -> dict[str, str]:
        """Of these layers, by name."""
        return {name: self._hash(name) for name in names}

    def are(self, expected: Mapping[str, str]) -> bool:
        """Whether the layers named there are as it says."""
        return all(self._hash(name) == value for name, value in expected.items())

    def _hash(self, name: str) -> str:
        if name not in self._found:
            layer: Any = self._model.get_submodule(name)
            weight = layer.weight.detach()
            self._found[name] = weights_hash({name: weight}, weight.dtype)
        return self._found[name]


def place_of(history: list[Application], now: WeightStates) -> int | None:
    """Number of the latest application that led to the weights of now.

    -1 where they are as before all of them, None where something else changed them. Applications
    may be about different layers: what one does not touch is as the nearest other one left it.
    """
    for place in reversed(range(-1, len(history))):
        expected: dict[str, str] = {}
        for later in reversed(history[place + 1 :]):
            expected |= later.before
        for entry in history[: place + 1]:
            expected |= entry.after
        if now.are(expected):
            return place
    return None


def forget_undone(history: list[Application], now: WeightStates) -> None:
    """Drops applications that were undone behind our back, as by an outer transaction."""
    place = place_of(history, now)
    if place is not None:
        del history[place + 1 :]
