"""Wall-clock seconds of what runs one after the other."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager


class Clock:
    """Seconds by name: of stages, or of laps since the clock was made.

    Args:
        digits: what seconds are rounded to.
        logger: hears of every stage, at level INFO.
    """

    def __init__(self, digits: int = 4, logger: logging.Logger | None = None) -> None:
        self.seconds: dict[str, float] = {}
        self._digits, self._logger = digits, logger
        self._last = time.perf_counter()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Adds what runs inside; nothing if it fails."""
        started = time.perf_counter()
        yield
        seconds = self.seconds.get(name, 0.0) + time.perf_counter() - started
        self.seconds[name] = round(seconds, self._digits)
        if self._logger is not None:
            self._logger.info("%s: %.2f s", name, self.seconds[name])

    def lap(self, name: str) -> None:
        """Notes the seconds since the last lap."""
        now = time.perf_counter()
        self.seconds[name] = round(now - self._last, self._digits)
        self._last = now
