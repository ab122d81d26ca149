"""Progress bars: tqdm on stderr, silenced by an argument or the way diffusers' are."""

from __future__ import annotations

import sys
from typing import Any

from tqdm.auto import tqdm


def enabled(progress: bool | None) -> bool:
    """Whether bars are drawn: `True`/`False` decide; `None` follows diffusers' switch.

    `diffusers.utils.logging.disable_progress_bar()` turns diffusers' bars off for the process. The
    module is looked up, never imported: where diffusers was not imported, nobody can have used it.
    """
    if progress is not None:
        return progress
    diffusers_logging: Any = sys.modules.get("diffusers.utils.logging")
    return diffusers_logging is None or diffusers_logging.is_progress_bar_enabled()


def progress_bar(
    *,
    total: int,
    desc: str,
    progress: bool | None,
    unit: str = "it",
    initial: int = 0,
    smoothing: float = 0.3,
) -> tqdm:
    """A bar of `total` steps, `initial` of them done; a disabled one counts without drawing.

    `smoothing` is tqdm's: 0 estimates the time left from all steps so far, 1 from the last one.
    """
    return tqdm(
        total=total,
        initial=initial,
        desc=desc,
        unit=unit,
        smoothing=smoothing,
        disable=not enabled(progress),
        leave=False,
    )
