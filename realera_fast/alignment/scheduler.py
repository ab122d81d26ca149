"""The noise schedule that alignment trains and checks with."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from realera_fast.alignment.config import AlignmentConfig
from realera_fast.runtime import unwrapped

logger = logging.getLogger(__name__)


def find_scheduler(unet: Any) -> Any | None:
    """The scheduler beside the model's own files, of the class that they name; None if none.

    Raises:
        ValueError: there is one, but none that diffusers can make.
    """
    import diffusers

    name = str(getattr(unwrapped(unet).config, "_name_or_path", "") or "")
    if not name:
        return None
    place = str(Path(name).parent) if Path(name).exists() else name
    try:
        config = diffusers.DDIMScheduler.load_config(
            place, subfolder="scheduler", local_files_only=True
        )
    except (OSError, ValueError) as error:
        logger.debug("no scheduler beside %s: %s", name, error)
        return None
    why = "it is no scheduler of diffusers, or one that needs a package which is not installed"
    kind = str(config.get("_class_name") if isinstance(config, Mapping) else config)
    try:
        found = getattr(diffusers, kind, None)
        if isinstance(found, type) and issubclass(found, diffusers.SchedulerMixin):
            scheduler: Any = found
            # What a file leaves out is the default of its own class, not of another.
            return scheduler.from_config(config)
    except Exception as error:
        # The file is anybody's, and so is what a class makes of it.
        why = str(error)
    raise ValueError(
        f"scheduler: {kind!r}, named beside the model's files, can't be made ({why}); pass "
        "scheduler=pipe.scheduler"
    )


ASSUMED = (
    "scheduler: none was given or found beside the U-Net, so Stable Diffusion's schedule was "
    "assumed (scaled linear, 1000 steps, noise prediction): pass scheduler=pipe.scheduler"
)
"""Warning where `assumed_scheduler` had to stand in."""


def assumed_scheduler() -> Any:
    """Stable Diffusion's noise schedule."""
    from diffusers import DDIMScheduler

    logger.warning(ASSUMED)
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


_DISTILLED = ("LCMScheduler", "TCDScheduler")
"""Schedulers of few steps, for weights that were trained to need no more."""


def distilled(scheduler: Any, config: AlignmentConfig) -> str | None:
    """What to say where trajectories are denoised in another way than the scheduler suggests."""
    name = type(scheduler).__name__
    if name not in _DISTILLED or config.guidance_scale <= 1.0:
        return None
    return (
        f"scheduler: {name} is for weights that are distilled to few steps; alignment denoised in "
        f"{config.sampling_steps} steps with guidance {config.guidance_scale}: if the U-Net is "
        "distilled, set AlignmentConfig(sampling_steps=4, guidance_scale=1.0)"
    )
