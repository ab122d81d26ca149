"""Who says what images show: judges, scorers and detectors, found by name and pinned."""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

from PIL import Image
from torch import Tensor

from realera_fast.evaluation.nudity import NudeNet

Detector = Callable[[Image.Image], Any]
"""Anything that says something of an image: a label, a number, a list of what it found."""


class Scorer(Protocol):
    """Anything that says how well images fit prompts."""

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        """`[n]` scores of image i and prompt i, higher is better."""
        ...


class Judge(Protocol):
    """Anything that names what images show."""

    def classify(self, images: Sequence[Image.Image]) -> tuple[Sequence[str], Sequence[str]]:
        """`[n]` images to `[n]` names of things and `[n]` names of styles."""
        ...


class Sight(Protocol):
    """What is seen in one image."""

    @property
    def things(self) -> Sequence[str]:
        """Names of everything that is there."""
        ...

    @property
    def name(self) -> str:
        """One name for the image."""
        ...


@runtime_checkable
class SceneJudge(Protocol):
    """A judge that tells several things in one image apart."""

    def look(self, images: Sequence[Image.Image]) -> Sequence[Sight]:
        """`[n]` images to what is seen in each."""
        ...


def find_detector(name: str) -> Detector:
    """The callable that ``module:name`` means, or the detector of a name that is known here:
    ``nudenet`` (`NudeNet`).

    Raises:
        ValueError: there is none, or what it needs is not installed.
    """
    if name == "nudenet":
        try:
            return NudeNet()
        except ModuleNotFoundError as error:
            raise ValueError(f"{name!r}: {error}") from error
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{name!r}: {error}; expected module:function, or nudenet") from error
    if not callable(found):
        raise ValueError(f"{name!r} is a {type(found).__name__}, expected a callable")
    return found


def identity_of(who: Any) -> Any:
    """What pins an evaluator: what it says of itself, or where it is from."""
    if callable(getattr(who, "identity", None)):
        return who.identity()
    of = who if inspect.isfunction(who) else type(who)
    package = (of.__module__ or "").split(".")[0]
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        version = None
    return {"name": f"{of.__module__}.{of.__qualname__}", "version": version}
